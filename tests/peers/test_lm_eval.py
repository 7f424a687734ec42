"""lm-eval asks for log-likelihoods over HTTP and gets what transformers computes from the same folder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import Served
from lm_eval.models.openai_completions import LocalCompletionsAPI
from transformers import AutoModelForCausalLM, AutoTokenizer

WORDS = ["parse", "read", "split", "join", "load", "store", "find", "count", "merge", "close"]
# No beginning ends with white space: lm-eval counts that as part of the ending.
PAIRS = [(f"def {w}_header(value, size={i}):", f'\n    """{w} the header."""\n') for i, w in enumerate(WORDS)]
PAIRS += [(f"Größe {i} – {w}:", f" {w} é{i} 漢字\n") for i, w in enumerate(WORDS)]  # characters of several tokens


@pytest.fixture(scope="module")
def peer(served: Served, request: pytest.FixtureRequest) -> LocalCompletionsAPI:
    """lm-eval's client: token ids as prompts, `echo` and `logprobs=1`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", served.key)
        yield LocalCompletionsAPI(
            base_url=f"{served.url}/completions",
            model="tiny",
            tokenizer=str(served.folder),
            tokenizer_backend="huggingface",
            max_length=2048,
            **request.param,
        )


def scores(served: Served) -> list[tuple[float, bool]]:
    """What transformers makes of `PAIRS`: the log-likelihood of each ending, and whether greedy decoding writes it."""
    tokenizer = AutoTokenizer.from_pretrained(served.folder)
    model = AutoModelForCausalLM.from_pretrained(served.folder, dtype=torch.float32).eval()
    found = []
    for start, end in PAIRS:
        begun, whole = tokenizer(start)["input_ids"], tokenizer(start + end)["input_ids"]
        with torch.no_grad():
            rows = model(torch.tensor([whole])).logits[0, len(begun) - 1 : -1].log_softmax(-1)
        wanted = torch.tensor(whole[len(begun) :])
        total = rows.gather(1, wanted[:, None]).sum().item()
        found.append((total, bool((rows.argmax(-1) == wanted).all())))
    return found


BY = [{"num_concurrent": 1, "batch_size": 1}, {"num_concurrent": 1, "batch_size": 8}]
BY += [{"num_concurrent": 4, "batch_size": 1}, {"num_concurrent": 1, "batch_size": 1, "tokenized_requests": False}]


@pytest.mark.parametrize("peer", BY, indirect=True, ids=["one by one", "batches", "concurrent", "texts"])
def test_loglikelihood(served: Served, peer: LocalCompletionsAPI) -> None:
    assert len(PAIRS) == 20
    found = peer.loglikelihood([SimpleNamespace(args=pair) for pair in PAIRS], disable_tqdm=True)
    wanted = scores(served)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in wanted], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
