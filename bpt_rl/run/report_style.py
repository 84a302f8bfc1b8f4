"""The report's style sheet. Colours of lines are Okabe and Ito's, told apart by colour-blind readers."""

STYLE = """
:root {
  --paper: #fcfcfa; --card: #ffffff; --ink: #1b1f24; --muted: #5b6470; --grid: #dcdfe4; --accent: #0b5fa5;
  --chain: #0072b2; --memoryless: #d55e00; --random: #6b7280; --data: #00815f; --null: #a8467f;
  --s0: #0072b2; --s1: #d55e00; --s2: #00815f; --s3: #a8467f; --s4: #b07c00; --s5: #3a9fd8; --s6: #4b4f57;
  --good: #00664b; --bad: #a63c00; --good-bg: #e2f3ec; --bad-bg: #fbe9df; --plain-bg: #eceef1;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1b1f25; --ink: #e7e9ec; --muted: #a1a9b4; --grid: #343a43; --accent: #6db8f2;
    --chain: #56b4e9; --memoryless: #ff9352; --random: #9aa3af; --data: #3fc79c; --null: #e091bf;
    --s0: #56b4e9; --s1: #ff9352; --s2: #3fc79c; --s3: #e091bf; --s4: #e6b422; --s5: #9ad4f5; --s6: #b9bec6;
    --good: #6fdcb6; --bad: #ffa274; --good-bg: #173a30; --bad-bg: #462a1c; --plain-bg: #2a3038;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55; font-size: 16px;
  font-family: Inter, system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
}
header, main { max-width: 1180px; margin: 0 auto; padding: 0 28px; }
header { padding-top: 52px; }
main { padding-bottom: 80px; }
h1 { font-size: 2.5rem; line-height: 1.12; letter-spacing: -0.022em; margin: 0; font-weight: 680; }
h2 { font-size: 1.3rem; letter-spacing: -0.01em; margin: 56px 0 16px; padding-top: 18px;
     border-top: 1px solid var(--grid); font-weight: 650; }
h3 { font-size: 1rem; margin: 0 0 6px; font-weight: 620; }
pre + h3 { margin-top: 20px; }
p { margin: 0 0 0.8em; }
small { display: block; font-size: 0.78rem; color: var(--muted); font-weight: 400; line-height: 1.4;
        overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.84rem; }
pre { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; padding: 14px 16px;
      margin: 0; overflow-x: auto; line-height: 1.5; }
.eyebrow { color: var(--accent); font-weight: 600; font-size: 0.82rem; letter-spacing: 0.06em;
           margin: 0 0 8px; text-transform: uppercase; }
.subtitle { color: var(--muted); font-size: 1.06rem; margin: 10px 0 0; max-width: 74ch; }
.verdict { margin: 30px 0 0; padding: 22px 26px 12px; background: var(--card); border: 1px solid var(--grid);
           border-left: 4px solid var(--accent); border-radius: 8px; font-size: 1.06rem; }
.verdict p { max-width: 82ch; }
.verdict p:first-child { font-size: 1.22rem; line-height: 1.45; }
.note { color: var(--muted); font-size: 0.86rem; max-width: 96ch; margin: 12px 0 0; }
.inline-number { white-space: nowrap; font-weight: 620; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.95rem; }
th { text-align: left; font-weight: 500; }
th, td { padding: 9px 12px; vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; }
thead button { all: unset; cursor: pointer; display: inline-block; }
thead button:focus-visible, .scroll:focus-visible, a:focus-visible { outline: 2px solid var(--accent);
                                                                    outline-offset: 3px; }
thead button::before { content: "\\2195\\00a0"; color: var(--muted); font-weight: 400; }
[aria-sort=ascending] button::before { content: "\\2191\\00a0"; color: var(--accent); font-weight: 700; }
[aria-sort=descending] button::before { content: "\\2193\\00a0"; color: var(--accent); font-weight: 700; }
a { color: var(--accent); }
thead th { border-bottom: 2px solid var(--ink); font-weight: 650; vertical-align: bottom; }
.results { min-width: 1000px; font-size: 0.92rem; }
.results td, .results thead th:not(:first-child) { padding-left: 8px; padding-right: 8px; }
.results td, .results thead th:not(:first-child) { text-align: right; }
.results tbody tr:last-child > * { border-bottom: 1px solid var(--grid); }
.results .group th { padding-top: 18px; padding-bottom: 2px; font-weight: 650; }
.results .group span { position: sticky; left: 0; display: inline-block;
                       max-width: calc(100vw - 36px); }
.results tr:not(.group) > th:first-child { position: sticky; left: 0; background: var(--paper);
                                           min-width: 150px; max-width: 260px; }
.results .number b { display: block; font-weight: 620; white-space: nowrap; }
.number small { white-space: nowrap; }
.number .failed { color: var(--bad); }
.none { color: var(--muted); }
.checks { min-width: 820px; }
.checks tbody tr { border-bottom: 1px solid var(--grid); }
.checks th:first-child { position: sticky; left: 0; background: var(--paper); min-width: 110px;
                         max-width: 250px; }
.checks thead th { font-size: 0.9rem; }
.margin { margin-top: 4px; }
.margin .inline-number { font-weight: 400; white-space: nowrap; }
.answer { display: inline-block; padding: 1px 10px; border-radius: 99px; font-size: 0.84rem; font-weight: 620;
          background: var(--plain-bg); }
.answer.yes { color: var(--good); background: var(--good-bg); }
.answer.no { color: var(--bad); background: var(--bad-bg); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 22px; }
.note + .plots { margin-top: 22px; }
figure { margin: 0; padding: 16px 18px 14px; background: var(--card); border: 1px solid var(--grid);
         border-radius: 8px; max-width: 720px; }
figure svg { display: block; width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
figcaption { color: var(--muted); font-size: 0.84rem; margin-top: 8px; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0 0 8px; padding: 0;
          font-size: 0.84rem; color: var(--muted); font-variant-numeric: tabular-nums; }
.key { position: relative; display: inline-block; width: 30px; margin-right: 7px; text-align: center;
       line-height: 1; height: 1em; vertical-align: -0.12em; color: var(--c); }
.key i { position: absolute; left: 0; right: 0; top: calc(50% - 1.5px); border-top: 3px solid var(--c); }
.key b { position: relative; top: -0.08em; font-weight: 400; font-size: 0.72rem; }
.key .dashed { border-top-style: dashed; }
.key .dotted { border-top-style: dotted; }
.key .dashdot { border: 0; height: 3px; top: calc(50% - 1px); background:
                repeating-linear-gradient(90deg, var(--c) 0 11px, transparent 11px 14px, var(--c) 14px 17px,
                                          transparent 17px 20px); }
.key .box { position: static; display: inline-block; width: 22px; border-top-width: 11px; opacity: 0.4; }
.films { display: grid; gap: 22px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 438px)); gap: 22px; }
.film figcaption { overflow-wrap: anywhere; }
.film img, .film video { display: block; width: 400px; max-width: 100%; height: auto; border-radius: 4px; }
details { border-top: 1px solid var(--grid); padding: 8px 0; }
details[open] { padding-bottom: 16px; }
summary { cursor: pointer; font-weight: 560; }
details pre { margin-top: 10px; }
.plain { width: auto; min-width: min(460px, 100%); font-size: 0.9rem; }
.plain tbody tr { border-bottom: 1px solid var(--grid); }
.plain th, .plain td { padding-top: 6px; padding-bottom: 6px; }
.plain th:first-child { position: sticky; left: 0; background: var(--paper); min-width: 110px;
                        max-width: 240px; overflow-wrap: anywhere; }
.differences td { overflow-wrap: anywhere; min-width: 92px; max-width: 260px; }
.differences th:first-child { min-width: 170px; }
.seeds td { white-space: nowrap; }
.sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
      white-space: nowrap; }
.number { position: relative; }
@media screen and (max-width: 640px) {
  header, main { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 30px; }
  h1 { font-size: 1.9rem; }
  h2 { margin-top: 40px; }
  .verdict { padding: 16px 16px 6px; }
  .verdict p:first-child { font-size: 1.1rem; }
  .inline-number, .margin .inline-number { white-space: normal; }
  figure { padding: 12px 12px 10px; }
  .results, .checks, .seeds { display: block; min-width: 0; width: 100%; }
  .results tbody, .checks tbody, .seeds tbody { display: block; }
  .results thead, .checks thead, .seeds thead { display: block; border-bottom: 2px solid var(--ink); }
  .results thead tr, .checks thead tr, .seeds thead tr { display: flex; flex-wrap: wrap; gap: 0 16px; }
  .results thead tr > th, .checks thead tr > th, .seeds thead tr > th { border: 0; min-width: 0;
    padding: 3px 0 !important; }
  .results thead small { display: none; }
  .results tbody tr, .checks tbody tr, .seeds tbody tr { display: grid; padding: 8px 0;
    grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 2px 14px; }
  .results tbody th, .checks tbody th, .seeds tbody th { grid-column: 1 / -1; position: static; padding: 4px 0 0;
    max-width: none; }
  .results tr:not(.group) > th:first-child { position: static; max-width: none; }
  .results tbody td, .checks tbody td, .seeds tbody td { padding: 4px 0; text-align: left; white-space: normal; }
  .results tbody .none, .seeds tbody .none { display: none; }
  .results tbody tr:last-child > * { border: 0; }
  .results tbody { border-bottom: 1px solid var(--grid); }
  td[data-label]::before { content: attr(data-label); display: block; font-size: 0.78rem; color: var(--muted); }
}
@page { margin: 14mm; }
@media print {
  body { background: none; font-size: 11pt; }
  header, main { max-width: none; padding-left: 0; padding-right: 0; }
  header { padding-top: 0; }
  h1 { font-size: 1.8rem; }
  h2 { margin-top: 28px; break-after: avoid; }
  h3 { break-after: avoid; }
  .verdict, figure, tr, .group + tr { break-inside: avoid; }
  .group { break-after: avoid; }
  .scroll { overflow: visible; }
  .results, .checks { min-width: 0; font-size: 0.74rem; }
  .results small, .checks small { font-size: 0.66rem; }
  .plain { font-size: 0.72rem; }
  .differences { width: 100%; }
  .differences td, .differences th:first-child { min-width: 0; }
  .key i { print-color-adjust: exact; }
  .results tr:not(.group) > th:first-child { min-width: 0; }
  th, td { padding: 5px 5px; }
  th:first-child { position: static !important; }
  thead button::before { content: none !important; }
  .plots { grid-template-columns: 1fr 1fr; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
