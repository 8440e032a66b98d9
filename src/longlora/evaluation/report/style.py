"""The look of the page: one style sheet for light and dark, wide and narrow, and the colours of shaded cells."""

from __future__ import annotations

# Anchors of matplotlib's cividis: even in brightness, the same with any colour vision.
_SHADES = ("#00224e", "#1a386f", "#434e6c", "#61656f", "#7d7c78", "#9b9476", "#bcae6c", "#dec958", "#fee838")
_INK_CHANGES = 0.47
"""Share from which on black stands out more than white."""


def shade_colours(share: float) -> tuple[str, str]:
    """Background and text colour, as ``#rrggbb``, of a cell that shows `share` (0 dark blue, 1 yellow)."""
    place = min(max(share, 0.0), 1.0) * (len(_SHADES) - 1)
    index = min(int(place), len(_SHADES) - 2)
    low, high = _SHADES[index], _SHADES[index + 1]
    parts = [
        round(int(low[at : at + 2], 16) * (1 - place + index) + int(high[at : at + 2], 16) * (place - index))
        for at in (1, 3, 5)
    ]
    return "#" + "".join(f"{part:02x}" for part in parts), "#ffffff" if share < _INK_CHANGES else "#000000"


STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --quiet: #5c6570; --rule: #d9dde2; --paper: #ffffff; --tint: #f5f6f8;
  --pass: #0b6b3a; --fail: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6ea; --quiet: #9aa4af; --rule: #353b43; --paper: #15181c;
  --tint: #1d2126; --pass: #5fcf94; --fail: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
  -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.5rem; line-height: 1.25; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; font-weight: 600; margin: 2.75rem 0 .6rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 1.25rem 0 .25rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.subtitle, .caption { color: var(--quiet); }
.caption { font-size: .875rem; }
ul { padding-left: 1.2rem; max-width: 46rem; }
li { margin: .25rem 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .75rem 0 1.25rem; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; vertical-align: top; text-align: left; border-bottom: 1px solid var(--rule); }
th:first-child { padding-left: 0; }
thead th { color: var(--quiet); font-weight: 500; font-size: .875rem; vertical-align: bottom; }
tbody th { font-weight: 400; overflow-wrap: anywhere; }
tr.joined > * { border-bottom: 0; padding-bottom: 0; }
.numeric th + th, .numeric td { text-align: right; white-space: nowrap; }
.numeric thead th + th { white-space: normal; overflow-wrap: anywhere; min-width: 5.5rem; max-width: 10rem; }
.numeric th:last-child, .numeric td:last-child { padding-right: 0; }
.detail { display: block; color: var(--quiet); font-size: .8125rem; }
sup { font-size: .75em; line-height: 0; color: var(--fail); }
.facts tbody th { color: var(--quiet); white-space: nowrap; }
.facts td { overflow-wrap: anywhere; min-width: 8rem; }
.verdicts { list-style: none; padding: 0; max-width: none; }
.verdicts > li { display: grid; grid-template-columns: 8.25rem 1fr; padding: .6rem 0; margin: 0;
  border-bottom: 1px solid var(--rule); }
.verdicts .detail { font-size: .875rem; }
.status { font-weight: 600; font-size: .875rem; line-height: 1.7; color: var(--quiet); }
.pass { color: var(--pass); }
.fail { color: var(--fail); }
.figures, .maps { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; margin: .75rem 0; }
.figures svg { height: auto; min-width: 0; }
.maps figure { margin: 0; min-width: 0; max-width: 100%; }
.maps figcaption { font-weight: 500; font-size: .9375rem; overflow-wrap: anywhere; }
.maps .scroll { margin: .25rem 0 .5rem; }
.maps table { width: auto; }
.maps th { border-bottom: 0; padding: .2rem .6rem .2rem 0; vertical-align: middle; font-size: .8125rem;
  color: var(--quiet); white-space: nowrap; }
.maps thead th + th { text-align: center; padding: .2rem; min-width: 0; }
.maps td { border: 2px solid var(--paper); padding: .3rem .35rem; min-width: 5.4rem; text-align: center;
  vertical-align: middle; font-weight: 600; font-size: .875rem; line-height: 1.35; white-space: nowrap; }
.maps td:last-child { padding-right: .35rem; }
.maps td .detail { color: inherit; font-weight: 400; font-size: .75rem; }
.maps td sup { color: inherit; }
.hatched { background-image: repeating-linear-gradient(135deg, transparent 0 7px,
  color-mix(in srgb, currentColor 22%, transparent) 7px 9px); }
details { border: 1px solid var(--rule); border-radius: 6px; margin: .75rem 0; }
summary { padding: .5rem .85rem; cursor: pointer; overflow-wrap: anywhere; }
details .scroll { margin: 0; padding: 0 .85rem .5rem; border-top: 1px solid var(--rule); }
pre { margin: 0; padding: .85rem; overflow-x: auto; background: var(--tint); border-top: 1px solid var(--rule);
  font: .8125rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media (min-width: 34.01rem) { .stacked tbody th { min-width: 8rem; } }
@media (max-width: 34rem) {
  body { padding: 1.25rem 1rem 3rem; }
  th, td { padding: .4rem .5rem; }
  table { font-size: .875rem; }
  .verdicts > li { grid-template-columns: 1fr; }
  .detail { font-size: .75rem; }
  .maps td { min-width: 4.4rem; padding-inline: .1rem; }
  .maps td .detail { font-size: .6875rem; }
  /* Where a table scrolls sideways its label stays in sight. */
  .maps th:first-child, .stacked tr > :first-child { position: sticky; left: 0; background: var(--paper); z-index: 1; }
  /* The label on a line of its own leaves the width to the numbers. */
  .stacked tr { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); column-gap: .4rem;
    width: max(100%, calc(var(--columns) * 5.5rem)); border-bottom: 1px solid var(--rule); }
  .stacked tr > * { border-bottom: 0; padding-inline: 0; }
  .stacked tr > :first-child { grid-column: 1 / -1; padding-bottom: 0; justify-self: start;
    max-width: calc(100vw - 2rem); }
  .stacked thead th + th { min-width: 0; }
  .stacked tr.joined { border-bottom: 0; }
}
"""
