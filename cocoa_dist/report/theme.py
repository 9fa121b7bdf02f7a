"""The page's look: one style sheet for both colour schemes, wide screens and phones.

A Python module and not a .css file, so that it is there wherever the package is.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --bg: #fbfaf8; --panel: #ffffff; --ink: #262320; --soft: #6b655f; --line: #e8e3dc;
  --accent: #8f4a24; --accent-soft: #f5e8de; --ok: #26704e; --ok-soft: #e2f1e8;
  --bad: #a83c34; --bad-soft: #f8e6e3; --hatch: #d9d3cb; --empty: #f1ede7;
  --context: #6b97bf; --bridge: #d98f2e; --target: #6fa878;
  --g0: #4477aa; --g1: #d9803f; --g2: #4f9e63; --g3: #c44e52; --g4: #8172b3;
  --g5: #937860; --g6: #cf72b1; --g7: #9c952a; --g8: #3a9dae;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, "Liberation Serif", serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #191715; --panel: #211f1c; --ink: #ece7e1; --soft: #a59d94; --line: #37332e;
    --accent: #e0a177; --accent-soft: #3d2c21; --ok: #7fcaa3; --ok-soft: #1f3a2d;
    --bad: #ec948a; --bad-soft: #452521; --hatch: #4a453f; --empty: #2a2723;
    --context: #6f9fca; --bridge: #dd9a43; --target: #77b281;
    --g0: #6d9fd3; --g1: #e39a62; --g2: #6dbb80; --g3: #dd7478; --g4: #a294d6;
    --g5: #b39a82; --g6: #dd91c6; --g7: #bdb64b; --g8: #58b9c9;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--bg); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
main { max-width: 1100px; margin: 0 auto; padding: 56px 28px 40px; }
h1, h2 { font-family: var(--serif); font-weight: 500; letter-spacing: -.01em; line-height: 1.2; }
h1 { font-size: 42px; margin: 4px 0 20px; }
h2 { font-size: 27px; margin: 0 0 8px; }
h3 { font-size: 15px; font-weight: 600; margin: 0 0 4px; }
p { margin: 0 0 12px; max-width: 70ch; }
a { color: var(--accent); text-underline-offset: 3px; }
section { margin-top: 76px; }
.eyebrow { color: var(--accent); font-size: 14px; letter-spacing: .04em; margin: 0; }
.lead { font-size: 19px; line-height: 1.6; max-width: 64ch; }
.quiet, figcaption, .note { color: var(--soft); font-size: 14px; }
.note { border-left: 3px solid var(--accent); padding-left: 12px; }
nav { margin-top: 24px; font-size: 14px; display: flex; flex-wrap: wrap; gap: 6px 20px; }
nav a { text-decoration: none; color: var(--soft); border-bottom: 1px solid var(--line); }
nav a:hover { color: var(--accent); border-color: var(--accent); }
.grid { display: grid; gap: 28px 36px; margin-top: 24px; }
.two { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.four { grid-template-columns: repeat(auto-fit, minmax(min(100%, 228px), 1fr)); gap: 28px 24px; }
figure { margin: 0; min-width: 0; }
.scroll { overflow-x: auto; }

table { border-collapse: collapse; width: 100%; font-size: 15px; }
table, .num { font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 6px; }
th { font-weight: 500; color: var(--soft); font-size: 13px; text-align: right; }
th, td { padding: 8px 0 8px 12px; border-bottom: 1px solid var(--line); vertical-align: baseline; }
thead th { padding-top: 0; }
th i { font-style: normal; font-size: 12px; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody th { color: var(--ink); font-size: 15px; }
tbody tr:last-child > * { border-bottom: 0; }
td.num { text-align: right; white-space: nowrap; }
td.num i { font-style: normal; color: var(--soft); font-size: 12px; display: inline-block;
  min-width: 2.6em; }
td.num b { font-weight: 500; padding: 2px 6px; border-radius: 6px; }
td.best b { background: var(--accent-soft); color: var(--accent); font-weight: 650; }
.facts td, .facts th { text-align: left; }
.facts td.num, .facts th.num { text-align: right; }
.facts code { font-size: 13px; color: var(--soft); overflow-wrap: anywhere; }
.pairs th { width: 11em; vertical-align: top; }

.queries { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 326px), 1fr));
  gap: 0 28px; margin-top: 12px; }
.query { padding: 16px 0 18px; border-top: 1px solid var(--line); min-width: 0; }
.query p { margin: 0; }
.query .ask, .query .words { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.query .ask { font-weight: 600; }
.query .words, .query .rank { color: var(--soft); font-size: 13px; }
.query .rank b { color: var(--ink); font-weight: 600; }
.query .hit b { color: var(--ok); }
.answers { display: flex; gap: 6px; align-items: center; margin: 9px 0 7px; }
.answers img { width: 46px; height: 46px; padding: 3px; border-radius: 9px; background: #fff;
  border: 1px solid var(--line); object-fit: contain; }
.answers img.right { outline: 3px solid var(--ok); outline-offset: 1px; margin: 0 3px; }
.answers .gap { color: var(--soft); width: 10px; text-align: center; }
.answers img.missed { outline: 2px dashed var(--bad); outline-offset: 2px; margin-left: 3px; }

.triple { display: grid; grid-template-columns: repeat(3, 1fr); gap: 6px; }
.triple img, .single img { width: 100%; aspect-ratio: 1; border-radius: 8px; display: block;
  image-rendering: pixelated; background: #fff; border: 1px solid var(--line); }
.triple img.holes { background: repeating-linear-gradient(45deg, var(--hatch) 0 4px,
  var(--empty) 4px 9px); }
.triple span { font-size: 12px; color: var(--soft); text-align: center; }
.filled { font-size: 15px; line-height: 1.9; margin: 8px 0 0; overflow-wrap: anywhere; }
.filled .ok, .filled .no { border-radius: 5px; padding: 1px 4px; white-space: pre-wrap; }
.filled .ok { background: var(--ok-soft); color: var(--ok); }
.filled .no { background: var(--bad-soft); color: var(--bad); }
.filled .no s { color: var(--soft); text-decoration: none; font-size: 12px; padding-left: 4px; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 12px;
  padding: 14px 16px; }
.bridge { display: grid; grid-template-columns: 64px minmax(0, 1fr); gap: 14px;
  align-items: start; }
.bridge .given { font-size: 13px; line-height: 1.4; color: var(--soft); overflow-wrap: anywhere; }
.bridge .filled { margin: 0; }
.bridge.texts { grid-template-columns: minmax(84px, 30%) minmax(0, 1fr); }
.cards { gap: 16px 24px; }
.legend { margin-top: 18px; }

svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  fill: var(--soft); font-variant-numeric: tabular-nums; }
.chart .grid { stroke: var(--line); display: inline; }
.chart .guide { stroke: var(--soft); stroke-dasharray: 3 4; }
.chart polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.chart .raw { stroke-width: 1; opacity: .35; }
.line-a { stroke: var(--accent); } .line-b { stroke: var(--context); }
.key { display: inline-flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; color: var(--soft);
  margin: 8px 0 0; padding: 0; list-style: none; }
.key li { display: inline-flex; align-items: center; gap: 7px; }
.key i { width: 12px; height: 12px; border-radius: 3px; flex: none; }
.key i.dot { border-radius: 50%; }
.key i.hollow { background: none; border: 2px solid var(--soft); border-radius: 50%; }
.key i.full { background: var(--soft); border-radius: 50%; }
.key i.stroke { height: 3px; width: 18px; border-radius: 2px; }
.mask { width: auto; max-width: 100%; margin-top: 10px; }
figcaption { margin-top: 10px; }
figcaption b { color: var(--ink); font-weight: 600; }
.mask .role-context { fill: var(--context); } .mask .role-bridge { fill: var(--bridge); }
.mask .role-target { fill: var(--target); } .mask .unseen { fill: var(--empty); }
.space { background: var(--panel); border: 1px solid var(--line); border-radius: 12px; }
.space line { stroke-width: .8; opacity: .28; }
.space circle { stroke-width: 0; opacity: .85; }
.space .ring { fill: var(--panel); stroke-width: 1.4; }
.gap { margin-top: 36px; }
.share { display: flex; height: 26px; margin: 16px 0 14px; border-radius: 6px; overflow: hidden;
  background: var(--empty); }
.share i { min-width: 2px; }
.causes { max-width: 720px; }
.causes i.dot { display: inline-block; width: 10px; height: 10px; border-radius: 3px;
  margin-right: 8px; }
.strip { position: relative; height: 30px; margin: 12px 0 4px; border-radius: 6px;
  background: var(--empty); }
.strip i { position: absolute; top: 9px; bottom: 9px; min-width: 2px; border-radius: 2px; }
.strip b { position: absolute; top: 2px; bottom: 2px; width: 2px; background: var(--soft); }
.strip b.saved { top: 22px; }
.strip b.broken { background: var(--bridge); } .strip b.bad { background: var(--bad); }
.strip b.warn { background: var(--accent); bottom: 22px; }
.moments { list-style: none; margin: 18px 0 0; padding: 0; font-size: 15px; max-width: 820px; }
.moments li { display: grid; grid-template-columns: 7.5em minmax(0, 1fr); gap: 12px;
  padding: 6px 0; border-bottom: 1px solid var(--line); }
.moments time { color: var(--soft); font-size: 13px; line-height: 1.85; text-align: right;
  font-variant-numeric: tabular-nums; }
.moments small { display: block; color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.moments b { font-weight: 600; } .moments .broken b { color: var(--bridge); }
.moments .bad b { color: var(--bad); } .moments .warn b { color: var(--accent); }
.want { background: var(--ok); }
footer { margin-top: 84px; padding-top: 20px; border-top: 1px solid var(--line);
  color: var(--soft); font-size: 13px; }
footer p { max-width: 90ch; }

@media (max-width: 620px) {
  main { padding: 32px 16px 32px; }
  h1 { font-size: 31px; } h2 { font-size: 23px; } .lead { font-size: 17px; }
  section { margin-top: 56px; }
  .four { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 20px 14px; }
  .four.wide { grid-template-columns: 1fr; }
  th, td { padding-left: 8px; }
  .pairs th { width: 7.5em; }
  .causes td:nth-child(2) { display: none; }
  .moments li { grid-template-columns: 5.6em minmax(0, 1fr); }
  .scroll table { font-size: 13px; } .scroll th { font-size: 12px; }
  .scroll th, .scroll td { padding-left: 6px; }
}
"""
_GROUPS = 9
STYLE += "".join(
    f".key i.g{n}, .share .g{n}, .strip .g{n}, .causes .g{n} {{ background: var(--g{n}); }} "
    f".space line.g{n}, .space .ring.g{n} {{ stroke: var(--g{n}); }} "
    f".space circle.g{n}:not(.ring) {{ fill: var(--g{n}); }}\n"
    for n in range(_GROUPS)
)
NUM_GROUPS = _GROUPS
