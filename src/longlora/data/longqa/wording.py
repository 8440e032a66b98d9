"""How the questions are put: several wordings of each task, of which the seed draws one. Plain data.

Names in braces are filled in by `tasks.py`. Each wording says what the answer has to look like.
"""

from __future__ import annotations

WORDINGS: dict[str, tuple[str, ...]] = {
    "next_sentence": (
        "Which sentence comes directly after this one in the text above? Answer with that sentence only.\n{sentence}",
        "Find the following sentence in the text and write down the one that comes next, word for word.\n{sentence}",
        "The text above contains the sentence below. Copy the one sentence that follows it.\n{sentence}",
        "{sentence}\nWhat is the very next sentence of the text? Give only that sentence.",
    ),
    "find_sentence": (
        'Which sentence of the text above contains the words "{phrase}"? Answer with the whole sentence.',
        'Find the sentence with the words "{phrase}" and copy it in full.',
        'The words "{phrase}" stand in one sentence of the text. Write down that sentence, word for word.',
        'Quote the sentence in which "{phrase}" occurs. Give only the sentence.',
    ),
    "order_events": (
        "The passages below stand in the text above, perhaps in another order. "
        "Give their numbers in the order of the text, with commas between.\n{passages}",
        "In which order do these passages come in the text? Answer with the numbers, with commas between.\n{passages}",
        "Sort these passages by where they stand in the text, earliest first. "
        "Answer with their numbers, with commas between.\n{passages}",
        "{passages}\nWhich of these passages of the text comes first, which next, and so on? "
        "Answer with the numbers in order, with commas between.",
    ),
    "fill_passage": (
        "Words are missing at [...] in this passage of the text above. Answer with the missing words only.\n{passage}",
        "Complete the following passage from the text: which words stand where it says [...]?\n{passage}",
        "This passage was copied from the text with a gap, marked [...]. Write down what belongs there.\n{passage}",
        "{passage}\nWhat does the text have in place of [...]? Give only those words.",
    ),
    "count_mentions": (
        'How many times does "{word}" occur in the text above? Answer with a number.',
        'Count every place where "{word}" stands in the text, and answer with the number only.',
        'How often does the text say "{word}"? Give a number.',
        'Go through the text and count "{word}". Which number do you get?',
    ),
    "which_chapter": (
        "Under which heading of the text above does this sentence stand? Answer with the heading.\n{sentence}",
        "Find the sentence below in the text. What is the heading of the part it belongs to?\n{sentence}",
        "{sentence}\nWhich chapter of the text is this sentence from? Answer with its heading as the text has it.",
        "Name the heading of the chapter that contains the following sentence.\n{sentence}",
    ),
}
