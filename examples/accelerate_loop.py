"""A hand-written training loop with accelerate that also extends the context; the two marked lines make it sparse.

    accelerate launch examples/accelerate_loop.py --data books/*.txt --output runs/loop

Every file is one document; the last one is held out. A context longer than the model's own (here 16,384 tokens instead
of 8,192) needs rescaled RoPE, which is part of the config: set it before the weights are loaded. OUTPUT is an ordinary
model with the adapter merged into it, which any inference engine can serve.

Call `use_s2` before `accelerator.prepare`, which may wrap the model. After `model.eval()` attention is full, after
`model.train()` sparse again: nothing else has to be switched.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import longlora  # line 1
from longlora.data.packing import IGNORE_INDEX, collate, pack
from longlora.model.rope import rescale_rope


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line; None reads them from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="folder or hub id [%(default)s]")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="UTF-8 text files, the last is held out")
    parser.add_argument("--output", type=Path, required=True, help="folder for the merged model")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps [%(default)s]")
    parser.add_argument("--context-length", type=int, default=16384, help="tokens in a packed row [%(default)s]")
    parser.add_argument("--group-size", type=int, default=2048, help="tokens in a group of S2-Attn [%(default)s]")
    parser.add_argument("--accumulate", type=int, default=8, help="rows in a step and process [%(default)s]")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="[%(default)s]")
    args = parser.parse_args(argv)
    if len(args.data) < 2:
        parser.error("--data needs two files or more: the last one is held out")
    return args


def packed_rows(documents: Sequence[Sequence[int]], context_length: int) -> Iterator[dict[str, Tensor]]:
    """Rows of at most `context_length` tokens; positions restart at each document, whose first token is no target."""
    for row in pack([len(ids) for ids in documents], context_length):
        input_ids = torch.tensor([i for span in row.spans for i in documents[span.document][span.start : span.stop]])
        position_ids = torch.cat([torch.arange(span.length) for span in row.spans])
        labels = input_ids.masked_fill(position_ids == 0, IGNORE_INDEX)
        yield {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


@torch.no_grad()
def heldout_loss(model: nn.Module, input_ids: Tensor) -> float:
    """Loss of one document, with full attention; without a KV cache, which would only cost memory."""
    model.eval()
    loss = model(input_ids=input_ids[None], labels=input_ids[None], use_cache=False).loss.item()
    model.train()
    return loss


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, train, measure again, save."""
    args = parse_arguments(argv)
    set_seed(0)
    # An epoch's last rows and the next one's first form a step together: by default accelerate would step on too few.
    accumulation = GradientAccumulationPlugin(num_steps=args.accumulate, sync_with_dataloader=False)
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_plugin=accumulation)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    *documents, heldout = tokenizer([path.read_text(encoding="utf-8") for path in args.data])["input_ids"]
    heldout = torch.tensor(heldout[: args.context_length], device=accelerator.device)

    config = AutoConfig.from_pretrained(args.model)
    if args.context_length > config.max_position_embeddings:
        config, _ = rescale_rope(config, args.context_length)
    model = AutoModelForCausalLM.from_pretrained(args.model, config=config, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    model.activation_checkpointing_enable()
    longlora.use_s2(model, group_size=args.group_size, sink_tokens=4)  # line 2

    loader = DataLoader(
        list(packed_rows(documents, args.context_length)),
        batch_size=1,
        shuffle=True,
        collate_fn=partial(collate, pad_token_id=tokenizer.pad_token_id or 0),
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    accelerator.print(f"held-out loss, full attention: {heldout_loss(model, heldout):.4f} before")
    step = 0
    for batch in chain.from_iterable(repeat(loader)):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            accelerator.print(f"step {step}: loss {loss.item():.4f}, sparse attention, last row")
            if step == args.steps:
                break
    accelerator.print(f"held-out loss, full attention: {heldout_loss(model, heldout):.4f} after {step} steps")

    if accelerator.is_main_process:
        accelerator.unwrap_model(model).merge_and_unload().save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
        print(f"model: {args.output}")


if __name__ == "__main__":
    main()
