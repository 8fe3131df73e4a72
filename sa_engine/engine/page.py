"""The loop on one page, to be looked at: what was done, how many masks it gave, how they look, what models gained.

One HTML file without a script; photos are inside, larger pictures and the report are linked beside it.
"""

import base64
import html
import os
from datetime import datetime
from pathlib import Path

from sa_engine.engine.figures import Shown, look_at
from sa_engine.engine.file import Loop, Step
from sa_engine.engine.state import LoopState, StepState
from sa_engine.engine.style import STYLE
from sa_engine.progress import duration
from sa_engine.rounds import MIOU, RECALL

_AGAIN_S = 60  # a page of a loop that runs is loaded again
_MEASURES = {MIOU: "1-point mIoU", RECALL: "AR@100"}
_TITLES = {
    "blur": "redacted",
    "ingest": "people's masks",
    "prefill": "masks of detected boxes",
    "auto": "automatic masks",
}


def page(loop: Loop, state: LoopState) -> str:
    """The whole page, of a loop in any state."""
    seen = [(step, state[step.name], look_at(step)) for step in loop.steps]
    name = html.escape(loop.out.resolve().name)
    again = f'<meta http-equiv="refresh" content="{_AGAIN_S}">\n' * (state.state == "running")
    parts = [
        f"<h1>Data engine: {name}</h1>",
        f'<p class="small">{_when(state)}</p>',
        _flow(state),
        *_to_do(loop, state),
        _tiles(seen),
        *_bars(seen),
        *_rounds(seen),
        *_strips(seen),
        *_table(loop, seen),
        "<h2>Steps</h2>",
        _steps(seen),
        *_large(loop, seen),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Data engine: {name}</title>\n<style>{STYLE}</style>\n{again}</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


Seen = tuple[Step, StepState, Shown]


def _when(state: LoopState) -> str:
    done = sum(step.status == "done" for step in state.steps)
    ends = [step.ended for step in state.steps if step.ended]
    last = f", the last one on {datetime.fromtimestamp(max(ends)):%d %B %Y, %H:%M}" if ends else ""
    return html.escape(
        f"{state.state}: {done} of {len(state.steps)} steps done in {duration(state.seconds)} of work{last}. "
        f"From {state.file}."
    )


def _flow(state: LoopState) -> str:
    """The steps in a line."""
    chips = (
        f'<span><i class="dot {step.shown}" title="{step.shown}"></i>{html.escape(step.name)}</span>'
        for step in state.steps
    )
    return f'<div class="flow">{"".join(chips)}</div>'


def _to_do(loop: Loop, state: LoopState) -> list[str]:
    """What people have to do now, or what went wrong."""
    found = []
    for step, known in zip(loop.steps, state.steps, strict=True):
        if known.status == "waiting":
            found.append(
                f'<div class="do"><b>To do: {html.escape(step.tell)}</b><br>The loop waits for '
                f"<code>{html.escape(str(step.out))}</code></div>"
            )
        if known.status == "failed":
            found.append(
                f'<div class="do bad"><b>{html.escape(step.name)} failed</b><br>'
                f"{html.escape(known.error)}</div>"
            )
    for name, text in state.refusals(loop).items():
        found.append(
            f'<div class="do"><b>To do: the gate refused {html.escape(name)}</b><br>'
            f"{html.escape(text)}</div>"
        )
    return found


def _tiles(seen: list[Seen]) -> str:
    """The loop in four numbers."""
    photos = max((shown.images or 0 for _, _, shown in seen), default=0)
    masks = sum(shown.masks or 0 for step, _, shown in seen if step.kind in ("ingest", "auto"))
    tiles = [(f"{photos:,}", "photos"), (f"{masks:,}", "masks, people's and automatic")]
    drawn = [s.masks / s.images for _, _, s in seen if s.masks is not None and s.images]
    if len(drawn) > 1:
        tiles.append((f"{drawn[0]:.1f} → {drawn[-1]:.1f}", "masks per image, first and last run"))
    rounds = [shown.round for _, _, shown in seen if shown.round is not None]
    last = {info.measure: gain for info in rounds if (gain := info.validation()) is not None}
    if MIOU in last:
        before, after = last[MIOU]
        tiles.append((f"{after - before:+.3f}", "1-point mIoU, by the last training"))
    if RECALL in last:
        tiles.append((f"{last[RECALL][1]:.3f}", "AR@100 of the detector"))
    cells = "".join(f'<div class="tile"><b>{b}</b><span>{text}</span></div>' for b, text in tiles)
    return f'<div class="tiles">{cells}</div>'


def _bars(seen: list[Seen]) -> list[str]:
    """Masks per image, a bar for each run."""
    runs = [
        (step, shown.masks / shown.images, shown)
        for step, _, shown in seen
        if shown.masks is not None and shown.images
    ]
    if not runs:
        return []
    most = max(each for _, each, _ in runs) or 1
    rows = [
        f"<div>{html.escape(step.name)} <span class='small'>{_TITLES.get(step.kind, '')}</span></div>"
        f'<div><span class="bar" style="width:{each / most:.1%}"></span></div>'
        f'<div class="num">{each:.1f} <span class="small">{shown.masks:,} in {shown.images:,}</span></div>'
        for step, each, shown in runs
    ]
    return [
        "<h2>Masks per image</h2>",
        f'<div class="bars">{"".join(rows)}</div>',
        '<p class="small">In the paper: 20 to 44 in stage 1, 72 in stage 2 with the prefilled ones, about 100 '
        "automatic ones (§4).</p>",
    ]


def _rounds(seen: list[Seen]) -> list[str]:
    """What each training gained."""
    names = {step.out: step.name for step, _, _ in seen}
    rows = []
    for step, _, shown in seen:
        info = shown.round
        if info is not None:
            gain = info.validation()
            gate = "-" if info.gate is None else "promoted" if info.gate.promoted else "refused"
            reason = "" if info.gate is None else f' title="{html.escape(info.gate.reason)}"'
            data = f"{sum(d.masks for d in info.data):,} masks of {sum(d.images for d in info.data):,} images"
            parent = names.get(info.parent.name, Path(info.parent.name).name)
            drawn = "not measured" if gain is None else _dumbbell(*gain)
            rows.append(
                f"<tr><td>{html.escape(step.name)}</td><td>{html.escape(parent)}</td>"
                f"<td>{data}</td><td class='num'>{info.iterations:,}</td><td>{_MEASURES[info.measure]}</td>"
                f"<td>{drawn}</td><td{reason}>{gate}</td></tr>"
            )
    if not rows:
        return []
    heads = "".join(
        f"<th>{text}</th>"
        for text in ("", "from", "trained on", "steps", "measure", "before → after", "gate")
    )
    return [
        "<h2>Trainings</h2>",
        f'<div class="wide"><table><tr>{heads}</tr>{"".join(rows)}</table></div>',
        '<p class="small">1-point mIoU: mean IoU after one click in the middle of a mask; AR@100: average recall of '
        "the detector's 100 best boxes. Both on images that are kept back from the training, or of the gate.</p>",
    ]


def _dumbbell(before: float, after: float) -> str:
    """Two values between 0 and 1 on a line, as SVG."""
    left, right = (20 + 200 * value for value in (before, after))
    colour = "#16a34a" if after >= before else "#dc2626"
    return (
        '<svg width="330" height="22" role="img"><line x1="20" x2="220" y1="11" y2="11" stroke="#e4e4e7"/>'
        f'<line x1="{left:.1f}" x2="{right:.1f}" y1="11" y2="11" stroke="{colour}" stroke-width="4"/>'
        f'<circle cx="{left:.1f}" cy="11" r="5" fill="#a1a1aa"/>'
        f'<circle cx="{right:.1f}" cy="11" r="5" fill="{colour}"/>'
        '<text class="axis" x="6" y="15">0</text><text class="axis" x="226" y="15">1</text>'
        f'<text x="242" y="15">{before:.3f} → {after:.3f}</text></svg>'
    )


def _strips(seen: list[Seen]) -> list[str]:
    """A few images of each run."""
    parts = []
    for step, _, shown in seen:
        if not shown.pictures:
            continue
        counts = ", ".join(f"{number:,} {kind}" for kind, number in shown.counts.items())
        about = (
            f"{_TITLES.get(step.kind, '')}, {shown.images or 0:,} images"
            + f", {counts}" * bool(counts)
        )
        figures = "".join(
            f'<figure><img alt="{html.escape(text)}" src="data:image/jpeg;base64,'
            f'{base64.b64encode(jpeg).decode()}"><figcaption>{html.escape(text)}</figcaption></figure>'
            for jpeg, text in shown.pictures
        )
        parts.append(
            f"<h3>{html.escape(step.name)} <span>{html.escape(about)}</span></h3>"
            f'<div class="strip">{figures}</div>'
        )
    return ["<h2>What it looks like</h2>", *parts] if parts else []


def _table(loop: Loop, seen: list[Seen]) -> list[str]:
    """The stages' table of the last `sa-engine report`."""
    found = [shown for _, _, shown in seen if shown.table]
    if not found:
        return []
    head, *rows = found[-1].table
    lines = ["".join(f"<td>{html.escape(text)}</td>" for text in row) for row in rows]
    link = ""
    if found[-1].page is not None:
        link = (
            f'<p><a href="{_link(loop, found[-1].page)}">The whole report, with its figures</a></p>'
        )
    return [
        "<h2>Stages</h2>",
        '<div class="wide"><table><tr>'
        + "".join(f"<th>{html.escape(text)}</th>" for text in head)
        + "</tr>"
        + "".join(f"<tr>{line}</tr>" for line in lines)
        + f"</table></div>{link}",
    ]


def _steps(seen: list[Seen]) -> str:
    most = max((known.seconds for _, known, _ in seen), default=0.0) or 1.0
    rows = []
    for step, known, shown in seen:
        took = duration(known.seconds) if known.seconds else ""
        bar = (
            f'<span class="bar time" style="width:{known.seconds / most:.1%}"></span>'
            if took
            else ""
        )
        said = step.tell if step.kind == "wait" else known.error or known.report
        lines = [
            html.escape(line)
            for line in (*said.splitlines(), shown.note)
            if line and not line.startswith("output: ") and not shown.table  # it has its own place
        ]
        rows.append(
            f'<tr><td style="white-space:nowrap"><span class="dot {known.shown}" title="{known.shown}"></span>'
            f"{html.escape(step.name)}</td><td><code>{html.escape(step.command)}</code>"
            f'<div class="small">{"<br>".join(lines)}</div></td>'
            f'<td class="num" style="width:6rem">{took or html.escape(known.status)}{bar}</td></tr>'
        )
    return f"<table>{''.join(rows)}</table>"


def _large(loop: Loop, seen: list[Seen]) -> list[str]:
    """Pictures that lie in the steps' folders."""
    parts = [
        f"<h3>{html.escape(step.name)} <span>{html.escape(file.name)}</span></h3>"
        f'<div class="large"><a href="{_link(loop, file)}"><img loading="lazy" alt="{html.escape(file.name)}" '
        f'src="{_link(loop, file)}"></a></div>'
        for step, _, shown in seen
        for file in shown.files
    ]
    return ["<h2>Pictures</h2>", *parts] if parts else []


def _link(loop: Loop, file: Path) -> str:
    relative = os.path.relpath(file, loop.out.resolve())
    return html.escape(
        Path(relative).as_posix() if not relative.startswith("..") else file.as_uri()
    )
