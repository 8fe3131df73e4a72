import dataclasses
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_stage import mask_record

from sa_engine.checked_files import ParquetRecords
from sa_engine.records import (
    ARROW_SCHEMA,
    KNOWN_SCHEMAS,
    SCHEMA_VERSION,
    ImageRecord,
    MaskRecord,
    RecordError,
    from_sa1b,
    from_table,
    mask_id,
    to_sa1b,
    to_table,
)

# The form of a released file: keys, their order, and which numbers are floats.
SA1B_TEXT = (
    '{"image": {"image_id": 7, "width": 9, "height": 6, "file_name": "sa_7.jpg"}, '
    '"annotations": [{"bbox": [2.0, 1.0, 3.0, 2.0], "area": 12, '
    '"segmentation": {"size": [6, 9], "counts": "=3300000a0"}, '
    '"predicted_iou": 0.910645067691803, "point_coords": [[2.5, 1.5]], '
    '"crop_box": [0.0, 0.0, 9.0, 6.0], "id": 70000, "stability_score": 1.0}]}'
)
SCORES = {"predicted_iou", "stability_score", "point_coords", "crop_box"}


def image_record(*masks: MaskRecord) -> ImageRecord:
    return ImageRecord(
        image_id=7,
        width=9,
        height=6,
        file_name="sa_7.jpg",
        source_path="a/ünï\ncode.png",
        sha256="ab" * 32,
        masks=masks,
    )


@pytest.fixture
def mask() -> MaskRecord:
    pixels = np.zeros((6, 9), bool)
    pixels[1:4, 2:6] = True
    return dataclasses.replace(
        mask_record(mask_id(7, 0), pixels),
        predicted_iou=float(np.float32(0.910645067691803)),
        stability_score=1,
    )


@pytest.fixture
def manual() -> MaskRecord:
    """A mask with every field that a model's mask lacks, and none that only a model has."""
    return MaskRecord(
        id=70001,
        segmentation={"size": [6, 9], "counts": "=3300000a0"},
        area=12,
        bbox=[2.0, 1.0, 3.0, 2.0],
        predicted_iou=None,
        stability_score=None,
        point_coords=None,
        crop_box=None,
        source="assisted",
        annotator="A. N.",
        tool="brush",
        time_s=34.0,
        time_scope="mask",
        round=2,
        z_order=-1,
        original_id="x-12",
        model_fingerprint="f" * 64,
        box_score=0.1 + 0.2,
        prefill_id=70000,
        edit_status="refined",
        edit_iou=0.75,
        redacted=False,
    )


def test_sa1b_json_is_a_released_file_to_the_letter(mask: MaskRecord) -> None:
    assert json.dumps(to_sa1b(image_record(mask))) == SA1B_TEXT


def test_sa1b_json_comes_back(mask: MaskRecord) -> None:
    record = from_sa1b(json.loads(SA1B_TEXT))
    assert json.dumps(to_sa1b(record)) == SA1B_TEXT
    assert record.masks[0].area == 12
    assert record.source_path is None


def test_sa1b_json_has_documented_placeholders_for_what_a_manual_mask_lacks(
    manual: MaskRecord,
) -> None:
    content = json.loads(json.dumps(to_sa1b(image_record(manual))))
    annotation = content["annotations"][0]
    assert {key: annotation[key] for key in SCORES} == {
        "predicted_iou": -1.0,
        "stability_score": -1.0,
        "point_coords": [],
        "crop_box": [0.0, 0.0, 9.0, 6.0],
    }
    assert isinstance(annotation["predicted_iou"], float)
    read = from_sa1b(content).masks[0]
    assert (read.predicted_iou, read.stability_score, read.point_coords) == (None, None, None)


def test_other_json_is_refused_by_the_key_that_it_lacks() -> None:
    content = json.loads(SA1B_TEXT)
    del content["annotations"][0]["crop_box"]
    with pytest.raises(RecordError, match="crop_box"):
        from_sa1b(content)


def test_no_mask_is_a_normal_record() -> None:
    record = image_record()
    assert to_sa1b(record)["annotations"] == []
    assert from_table(to_table([record])) == [record]


def test_every_field_survives_parquet(mask: MaskRecord, manual: MaskRecord) -> None:
    record = image_record(mask, manual)
    assert from_table(to_table([record])) == [record]
    unset = [name for name, value in vars(manual).items() if value is None]
    assert set(unset) == SCORES, "the test's mask must fill every field that a model's mask lacks"


def test_the_arrow_schema_has_every_field_in_order() -> None:
    names = [field.name for field in dataclasses.fields(MaskRecord)]
    assert [field.name for field in ARROW_SCHEMA.field("masks").type.value_type] == names
    assert ARROW_SCHEMA.names == [field.name for field in dataclasses.fields(ImageRecord)]


def test_another_schema_version_is_refused(mask: MaskRecord) -> None:
    record = image_record(mask)
    newer = to_table([record]).replace_schema_metadata({"schema_version": "99"})
    with pytest.raises(RecordError, match=f"99.*{SCHEMA_VERSION}"):
        from_table(newer)
    with pytest.raises(RecordError, match="none"):
        from_table(pa.table({"image_id": [1]}))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["predicted_iou", "time_s", "bbox", "point_coords"])
def test_numbers_that_are_not_finite_are_refused(
    mask: MaskRecord, number: float, name: str
) -> None:
    values = {"bbox": [1.0, number, 2.0, 3.0], "point_coords": [[number, 1.0]]}
    broken = dataclasses.replace(mask, **{name: values.get(name, number)})
    with pytest.raises(RecordError, match=f"a mask has a {name} that is not finite"):
        to_table([image_record(mask, broken)])


def test_mask_ids_of_two_images_never_meet() -> None:
    assert mask_id(1, 9_999) < mask_id(2, 0)
    with pytest.raises(RecordError, match="image 1 .* 10000"):
        mask_id(1, 10_000)


def test_an_unknown_source_is_refused(mask: MaskRecord) -> None:
    with pytest.raises(RecordError, match="magic.*semi-automatic"):
        dataclasses.replace(mask, source="magic")


def test_shards_from_before_a_column_came_are_known(mask: MaskRecord) -> None:
    table = to_table([image_record(mask)])
    for schema, known in [*((one, True) for one in KNOWN_SCHEMAS), (ARROW_SCHEMA.remove(4), False)]:
        columns = [table.column(name) for name in schema.names]
        columns[-1] = columns[-1].cast(schema.field("masks").type)
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns, schema=schema), buffer)
        file = ParquetRecords(buffer.getvalue())
        assert (file.schema_problem() is None) == known
        if known:
            assert file.read(0) == [image_record(mask)]
