"""How the demo page looks: its style sheet and the HTML of what changes on it. All text that is not ours is escaped."""

from __future__ import annotations

from html import escape

# Colours of both schemes are the theme's own, so that the page follows the browser's.
CSS = """
.gradio-container { width: 100%; max-width: 1120px !important; margin: 0 auto !important; }
.gradio-container main.contain, .gradio-container main, .gradio-container .wrap { width: 100%; }
#title p { margin: 0; opacity: .72; }
#title h1 { font-size: 1.35rem; line-height: 1.3; margin: .1rem 0; overflow-wrap: anywhere; }
#file td.download { padding-right: 2rem; }
#buttons { justify-content: flex-start; }
#buttons button { flex: 0 0 auto; min-width: 9rem; }
#answer, #answer > div, #numbers, #numbers > div { padding: 0; }
.state { font-size: .92rem; min-height: 1.4em; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.state .parts { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; }
.state .bar { height: .5rem; margin-top: .45rem; border-radius: .25rem; background: var(--border-color-primary); }
.state .bar div { height: 100%; border-radius: inherit; background: var(--color-accent); }
.state.refused span { color: #b91c1c; }
.dark .state.refused span { color: #fca5a5; }
.state.refused .bar div { background: #dc2626; }
.answer { box-sizing: border-box; min-height: 9rem; padding: .9rem 1rem; border: 1px solid var(--border-color-primary);
  border-radius: var(--block-radius); background: var(--block-background-fill); color: var(--body-text-color);
  font-size: .97rem; line-height: 1.55; white-space: pre-wrap; overflow-wrap: anywhere; }
.answer.empty { opacity: .6; }
.answer.going::after { content: "\\258d"; margin-left: .1rem; color: var(--color-accent); }
footer { display: none !important; }
"""


def title_html(name: str, window: int) -> str:
    """The head of the page."""
    about = f"Ask about one document, within {window:,} tokens."
    return f"<p>longlora</p><h1>{escape(name)}</h1><p>{about}</p>"


def state_html(line: str, *, refused: bool = False, share: float = 0.0) -> str:
    """A line for a person, broken between its parts (``; ``), with a bar if something is partly full or partly read."""
    parts = "".join(f"<span>{escape(part)}</span>" for part in line.split("; "))
    bar = f'<div class="bar"><div style="width: {min(1.0, share):.1%}"></div></div>' if share else ""
    kind = " refused" if refused else ""
    return f'<div class="state{kind}" role="status"><div class="parts">{parts}</div>{bar}</div>'


def answer_html(text: str, *, going: bool = False) -> str:
    """An answer as plain text, whatever a model writes; a sign at its end while it comes."""
    if not text and not going:
        return '<div class="answer empty">The answer appears here.</div>'
    return f'<div class="answer{" going" if going else ""}">{escape(text)}</div>'
