"""Can a model look a sentence up at all? The same questions asked in its chat template, and as plain continuation.

`next_sentence` rows of `longlora data longqa` quote a sentence and ask for the one after it. Plainly, the quoted
sentence stands behind the document and the model goes on: nothing has to be understood but that a text is repeated.

    python benchmarks/probe_lookup.py MODEL heldout.jsonl --longest 4096
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longlora.data.longqa.score import score_answer


def prompts(row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    """Both ways to ask; empty where the quoted sentence cannot be told from the text."""
    content, reference, evidence = row["messages"][0]["content"], row["answer"], row["evidence"]
    both = content[evidence["start"] : evidence["end"]]
    if reference not in both:
        return {}
    quoted = both[: both.rindex(reference)].rstrip()
    asked = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
    return {"asked": asked, "continued": f"{content[: row['document_end']]}\n\n{quoted}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("questions", type=Path)
    parser.add_argument("--longest", type=int, default=4096)
    chosen = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.bfloat16).eval()
    scores: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for line in chosen.questions.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["task"] != "next_sentence" or row["length"] > chosen.longest:
            continue
        tokens = len(tokenizer(row["answer"], add_special_tokens=False).input_ids)
        for way, text in prompts(row, tokenizer).items():
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
            with torch.inference_mode():
                said = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
            answer = tokenizer.decode(said, skip_special_tokens=True)
            scores[way, row["length"]].append(score_answer("words", answer, row["answer"]))
    for (way, length), found in sorted(scores.items()):
        exact, f1 = (statistics.mean(column) for column in zip(*found, strict=True))
        print(f"{way}, {length} tokens: exact match {exact:.2f}, F1 {f1:.3f}, {len(found)} questions")


if __name__ == "__main__":
    main()
