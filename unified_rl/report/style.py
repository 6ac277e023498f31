"""Style sheet of the HTML report: light and dark, phone and desktop. Colours keep a contrast of 4.5 or more."""

STYLE = """
:root { --paper: #fbfbfa; --card: #ffffff; --ink: #1c2026; --muted: #59616c; --line: #d9dde3; --grid: #e6e9ed;
  --s0: #1f6fb5; --s1: #b5541a; --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1c2026; --ink: #e8eaed; --muted: #a3abb6;
  --line: #343a43; --grid: #2a3038; --s0: #6bb0ea; --s1: #f0a05f; --good: #4ade80; --bad: #f98080; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
header, main { max-width: 66rem; margin: 0 auto; padding: 0 1.1rem; }
header { padding-top: 2rem; }
h1 { font-size: 1.8rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: .98rem; margin: 0 0 .5rem; }
header p, small, figcaption, .legend, section > p, .chart p { color: var(--muted); }
small { font-size: .82em; }
main { padding-bottom: 3rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .8rem; margin: 0 0 1.2rem; }
.card, .pair, .sample, .chart, .overlay { background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
.card { padding: .7rem .9rem; }
.card dt { color: var(--muted); font-size: .85rem; }
.card dd { margin: 0; font-size: 1.35rem; font-weight: 650; white-space: nowrap; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); font-size: .9rem; padding-bottom: .3rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child { text-align: left; padding-left: .2rem; }
tbody th { font-weight: 500; }
thead th { font-size: .85rem; color: var(--muted); }
.up { color: var(--good); font-weight: 600; } .down { color: var(--bad); font-weight: 600; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(18.5rem, 1fr)); gap: .9rem; }
.pair { padding: .8rem .9rem; }
.pair > div { display: flex; gap: .9rem; }
.pair figure { margin: 0; flex: 1; min-width: 0; }
img { image-rendering: pixelated; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: .3rem;
  display: block; }
.pair figcaption { font-size: .85rem; margin-top: .3rem; } .pair small { display: block; }
.mark { font-weight: 600; white-space: nowrap; } .ok { color: var(--good); } .no { color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: .9rem; }
.chart { margin: 0; padding: .8rem .9rem; }
.chart figcaption { color: var(--ink); font-weight: 600; font-size: .95rem; }
.chart p { margin: .2rem 0 0; font-size: .85rem; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--muted); font-size: 13px; }
svg .grid { stroke: var(--grid); }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
.s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); } .s1 { stroke-dasharray: 6 3; }
.d0, .k0 { fill: var(--s0); background: var(--s0); } .d1, .k1 { fill: var(--s1); background: var(--s1); }
.legend { list-style: none; margin: .2rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem;
  font-size: .85rem; }
.key { display: inline-block; width: .75em; height: .75em; margin-right: .4em; border-radius: 50%; }
.k1 { border-radius: 1px; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: .9rem; }
.sample { padding: .9rem; display: flex; gap: 1rem; align-items: flex-start; }
.sample > div { min-width: 0; } .sample img { flex: none; max-width: 40%; }
.sample p { margin: 0 0 .5rem; font-size: .9rem; }
.tokens { display: flex; flex-wrap: wrap; gap: .3rem; }
.tok { border-radius: .3rem; padding: .1rem .45rem; text-align: center; font-size: .92rem; }
.tok small { display: block; color: inherit; font-size: .72rem; }
.l0 { background: #2171b5; color: #fff; } .l1 { background: #6baed6; color: #000; }
.l2 { background: #bdd7e7; color: #000; } .l3 { background: #fee0b6; color: #000; }
.l4 { background: #fdae61; color: #000; }
.l5 { background: #d7583c; color: #000; }
.strip { list-style: none; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: .6rem; }
.strip small { display: block; text-align: center; }
.overlays { display: grid; gap: .9rem; margin-bottom: 1.2rem; }
.overlay { padding: .9rem; } .overlay > p { margin: 0 0 .5rem; font-size: .9rem; }
.overlay img { image-rendering: auto; border: 0; }
.overlay ol { margin: .6rem 0 0; padding-left: 1.6rem; display: grid; gap: 0 1.2rem; font-size: .9rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); }
meter { width: 6rem; vertical-align: middle; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem;
  font-size: .85rem; line-height: 1.4; }
summary { cursor: pointer; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
:focus-visible { outline: 2px solid var(--s0); outline-offset: 2px; }
@media (max-width: 40rem) { td small { display: block; } td .own { display: none; } tbody th { white-space: normal; }
  th, td { padding-left: .35rem; padding-right: .35rem; }
  .pair img, .sample img { width: 100%; } .sample img { width: 7rem; } }
@media print { .card, .pair, .sample, .chart, .overlay { break-inside: avoid; } }
"""
