"""The report's style sheet: light, dark and print, from a phone's width up, without anything from outside."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfaf8; --card: #fff; --ink: #1c1b1a; --soft: #6b6762; --rule: #e4e0da; --good: #1f7a4d;
  --student: #2f5fd0; --teacher: #c2571a; --third: #1f8a5f; --fourth: #8b4bb8; --fifth: #a2781b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #151517; --card: #1e1e21; --ink: #ecebe8; --soft: #a19d97; --rule: #34343a; --good: #7fd6a8;
    --student: #8fb0ff; --teacher: #f2a26b; --third: #6fd3a5; --fourth: #cf9bf2; --fifth: #e0bd63;
  }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, Arial, sans-serif }
main { max-width: 1240px; margin: 0 auto; padding: 40px 32px 64px }
h1 { font-size: clamp(1.7rem, 4vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .3em; overflow-wrap: anywhere }
h1.next { margin-top: 2.2em; padding-top: .8em; border-top: 1px solid var(--rule) }
h2 { font-size: 1.3rem; letter-spacing: -.01em; margin: 2.4em 0 .2em }
h3 { font-size: 1rem; margin: 0 0 .3em; color: var(--ink) }
p { margin: .3em 0 1em; max-width: 76ch }
.soft, figcaption, .over { color: var(--soft) }
.over { font-size: .8rem; letter-spacing: .08em; text-transform: uppercase; margin: 0 0 .6em }
.lead { font-size: 1.1rem }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .86em; overflow-wrap: anywhere }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 18px 20px }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin: 22px 0 8px }
.tile b { display: block; font-size: 1.7rem; line-height: 1.2; letter-spacing: -.02em; font-variant-numeric: tabular-nums }
.tile span { font-size: .86rem; color: var(--soft); display: block; line-height: 1.35 }

.faces { display: grid; grid-template-columns: 112px minmax(0, 1fr) minmax(0, 1fr); gap: 6px 18px; align-items: center; margin-top: 14px }
.faces .head { font-weight: 600; font-size: .92rem; padding-bottom: 4px }
.student { color: var(--student) }
.teacher { color: var(--teacher) }
.previous { color: var(--third) }
.count { font-variant-numeric: tabular-nums; line-height: 1.2; white-space: nowrap }
.count b { font-size: 1.15rem }
.count small { display: block; color: var(--soft); font-size: .76rem }
.row { display: grid; grid-template-columns: repeat(8, minmax(0, 1fr)); gap: 3px }
.row img { width: 100%; display: block; aspect-ratio: 1; border-radius: 4px; background: var(--rule) }
.beside { display: grid; grid-template-columns: minmax(140px, 220px) minmax(0, 1fr); gap: 6px 18px; align-items: center; margin-top: 8px }
.beside .label { overflow-wrap: anywhere; line-height: 1.25; font-size: .92rem }
.beside .label small { display: block; color: var(--soft); font-size: .78rem; margin-top: 2px }
h3.of { margin: 1.4em 0 .2em }
.none { color: var(--soft); font-size: .86rem }
.who { display: none }

.scroll { overflow-x: auto; margin: 14px 0 }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; width: 100%; font-size: .92rem }
th, td { padding: 6px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule) }
thead th {
  font-weight: 600; font-size: .8rem; color: var(--soft); line-height: 1.25; white-space: normal; min-width: 4.6em;
  vertical-align: bottom; border-bottom-color: var(--soft);
}
td:first-child, tr:first-child th:first-child { text-align: left; padding-left: 2px; position: sticky; left: 0; background: var(--page) }
.compared td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 13em; max-width: 20em; line-height: 1.3 }
tbody tr:last-child td { border-bottom: 0 }
.grouped td { border-bottom: 0; padding-top: 2px; padding-bottom: 2px }
.grouped td[rowspan] { vertical-align: top; font-weight: 600 }
.grouped tr:has(td[rowspan]) td { border-top: 1px solid var(--rule); padding-top: 7px }
.grouped td:first-child:not([rowspan]) { position: static; padding-left: 12px }
td.model, thead th.model { text-align: left }
td.differs { text-align: left; white-space: normal; min-width: 15em; line-height: 1.35; overflow-wrap: anywhere }
.best { font-weight: 650; color: var(--good) }

.two { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 26px; align-items: center; margin-top: 14px }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); gap: 14px; margin-top: 14px }
.plots > figure { max-width: 560px }
.plots.many { grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)) }
.plot_alone { margin-top: 14px }
.plot_alone svg.plot:not(.wide) { display: none }
.plots .card { padding: 14px 14px 10px }
.two + p { margin-top: 1em }
figure { margin: 0 }
figcaption { font-size: .86rem; line-height: 1.4; margin-top: 6px }
figcaption b { color: var(--ink) }
.progress { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; margin-top: 14px }
.progress img { width: 100%; max-width: 300px; display: block; border-radius: 8px }
.sheet img { width: 100%; max-width: 1200px; display: block; border-radius: 8px; margin-top: 14px; background: #fff }
.sheets { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 18px; margin-top: 14px }
.sheets.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)) }
.sheets img { width: 100%; display: block; border-radius: 8px }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .88rem; margin: .5em 0 0 }
.legend i { display: inline-block; width: 18px; height: 3px; border-radius: 2px; vertical-align: middle; margin-right: 7px }
svg.plot { width: 100%; height: auto; display: block; overflow: visible }
svg .grid { stroke: var(--rule); stroke-width: 1 }
svg .axis { stroke: var(--soft); stroke-width: 1 }
svg .tick { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums }
svg .end { text-anchor: end }
svg .middle { text-anchor: middle }
svg .raw { fill: none; stroke-width: 1; opacity: .28; stroke-linejoin: round }
svg .behind { fill: none; stroke: var(--soft); stroke-width: 1; opacity: .3; stroke-linejoin: round }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
.spark { width: 96px; height: 20px; vertical-align: middle }
.spark polyline { fill: none; stroke: var(--soft); stroke-width: 1.3 }

dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 18px; margin: 0; font-size: .92rem }
dt { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere }
details { margin-top: 16px }
details.part { margin-top: 30px; border-top: 1px solid var(--rule); padding-top: 12px }
details.part > summary { font-size: 1.2rem; overflow-wrap: anywhere }
summary { cursor: pointer; font-weight: 600 }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px; line-height: 1.45 }
.notice { border-left: 3px solid var(--teacher); padding: 2px 0 2px 14px; margin: 1em 0; overflow-wrap: anywhere }
footer { margin-top: 56px; padding-top: 16px; border-top: 1px solid var(--rule); font-size: .84rem; color: var(--soft) }

@media (max-width: 760px) {
  main { padding: 24px 16px 48px }
  .plot_alone svg.plot.wide { display: none }
  .plot_alone svg.plot:not(.wide) { display: block }
  .two, dl { grid-template-columns: minmax(0, 1fr) }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)) }
  .tile b { font-size: 1.35rem }
  .card { padding: 14px }
  .faces, .beside { grid-template-columns: minmax(0, 1fr); gap: 4px }
  .beside .label { margin-top: 10px }
  .beside .label small { display: inline; margin-left: 8px }
  .faces .head, .none .who { display: none }
  .faces .count { margin-top: 18px }
  .faces .count small { display: inline; margin-left: 8px }
  .who { display: block; font-size: .78rem; line-height: 1.3; margin: 5px 0 3px }
  th, td { padding: 6px 9px }
  .compared td:first-child { min-width: 9em; max-width: 40vw }
  dl { gap: 0 }
  dd { margin-bottom: 7px }
  .progress { grid-template-columns: repeat(2, minmax(0, 1fr)) }
}
@media print {
  :root { --page: #fff; --card: #fff; --ink: #000; --soft: #555; --rule: #ccc; --good: #14633c; --student: #1d4ab0; --teacher: #a9480f }
  main { max-width: none; padding: 0 }
  body { font-size: 10.5pt }
  .card, .row, figure, tr { break-inside: avoid }
  h2, h3 { break-after: avoid }
  .scroll { overflow: visible }
  details.part::details-content { content-visibility: visible; block-size: auto }
  th, td { padding: 3px 6px }
  img, svg { print-color-adjust: exact; -webkit-print-color-adjust: exact }
}
"""
