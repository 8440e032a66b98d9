"""A compiled model computes what it computes without torch.compile, with graphs that packings have in common."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM

import longlora


@pytest.mark.slow
def test_training_compiled(tiny_llama: LlamaForCausalLM) -> None:
    longlora.use_s2(tiny_llama.train(), group_size=4, sink_tokens=1)
    torch._dynamo.reset()
    compiled = torch.compile(tiny_llama, backend="aot_eager")
    ids = torch.randint(128, (1, 42), generator=torch.Generator().manual_seed(0))
    weight = tiny_llama.model.layers[0].self_attn.q_proj.weight

    def step(model: torch.nn.Module, positions: Tensor) -> tuple[Tensor, Tensor]:
        loss = model(input_ids=ids, labels=ids, position_ids=positions).loss
        return loss.detach(), torch.autograd.grad(loss, weight)[0]

    graphs = []
    for lengths in ([42], [21, 21], [5, 5, 32], [1, 41], [7, 8, 27], [3] * 14):
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        torch.testing.assert_close(step(compiled, positions), step(tiny_llama, positions))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1], "a graph for each packing"

    # Modes and settings that change later.
    with torch.no_grad():
        for training in (False, True):
            tiny_llama.train(training)
            torch.testing.assert_close(compiled(input_ids=ids).logits, tiny_llama(input_ids=ids).logits)
        longlora.use_s2(tiny_llama, group_size=8, sink_tokens=0, full_attention_layers=[1])
        torch.testing.assert_close(compiled(input_ids=ids).logits, tiny_llama(input_ids=ids).logits)
