"""How the page of a loop looks."""

STYLE = """
:root { color-scheme: light; --line: #e4e4e7; --grey: #71717a; --ink: #18181b; }
* { box-sizing: border-box; }
body { background: #fff; color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 72rem; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: .95rem; margin: 1.25rem 0 .4rem; } h3 span { color: var(--grey); font-weight: 400; }
p { margin: .3rem 0; } .small { color: var(--grey); font-size: .85rem; }
code { font: .78rem/1.45 ui-monospace, monospace; color: #3f3f46; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.tile { border: 1px solid var(--line); border-radius: .5rem; flex: 1 1 9rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--grey); font-size: .82rem; }
.do { background: #fef3c7; border-left: 4px solid #d97706; margin: 1rem 0; padding: .7rem 1rem; }
.bad { background: #fee2e2; border-color: #dc2626; white-space: pre-wrap; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left; vertical-align: top; }
th { color: var(--grey); font-weight: 500; } .num { text-align: right; white-space: nowrap; }
.dot { border-radius: 50%; display: inline-block; height: .7rem; margin-right: .5rem; width: .7rem; }
.done { background: #16a34a; } .open { background: #d4d4d8; } .running { background: #2563eb; }
.waiting, .refused { background: #d97706; } .failed { background: #dc2626; } .stopped { background: #9333ea; }
.bar { background: #2563eb; border-radius: .2rem; display: block; height: .75rem; min-width: 2px; }
.time { background: #a1a1aa; height: .3rem; margin-top: .2rem; }
.flow { display: flex; flex-wrap: wrap; gap: .35rem .2rem; margin: 1rem 0; font-size: .85rem; }
.flow span { white-space: nowrap; } .flow span + span::before { color: #a1a1aa; content: "→"; margin: 0 .35rem; }
.flow .dot { margin-right: .3rem; }
.bars { display: grid; gap: .45rem .8rem; grid-template-columns: max-content 1fr max-content; align-items: center; }
.strip { display: flex; flex-wrap: wrap; gap: .6rem; }
.strip figure { margin: 0; } .strip img { border-radius: .25rem; display: block; height: 10.5rem; max-width: 100%; }
figcaption { color: var(--grey); font-size: .8rem; }
.large img { border: 1px solid var(--line); max-width: 100%; }
.wide { overflow-x: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); } svg .axis { fill: var(--grey); font-size: 11px; }
"""
