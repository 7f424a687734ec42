"""llama.cpp's own server loads the GGUF files that we write: the same token ids, and the tokens that torch writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PYTHON, ROOT, environment

SERVER = Path(os.environ.get("LLMKIT_LLAMA", ROOT / "runs/bench/peers/llama.cpp/build/bin")) / "llama-server"
pytestmark = pytest.mark.skipif(
    not SERVER.is_file(), reason=f"{SERVER} is not there: make bench-serving builds it, or set LLMKIT_LLAMA"
)
CASES = ("llama", "qwen3", "qwen2", "llama3")
TEXTS = [
    "def parse_header(value, size=12):\n    return value[:12] + [345]\n",
    "I'm told it's 3.14159, isn't it?  We'LL see...   \t\n\n\n  ",
    "größer – 漢字かな 🙂👩‍🚀 ½ ٣٤ हिन्दी",
    "<|user|>\nhello<|end|>\n<|assistant|>\n",
    " ",
]
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "?"}]

# Each family with a tokenizer of another kind, all random and trained on the spot, in the product's environment.
MAKE = f"""
import json, sys, torch
from pathlib import Path
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config
from llmkit.core.tiny import SPECIAL, TEXTS, make_tokenizer, tiny_model
from llmkit.data.tokenizer import train_tokenizer
from llmkit.models.factory import ModelConfig, build, save_model
from llmkit.optimization.gguf import write_gguf
from llmkit.optimization.vocabulary import TEXT
from llmkit.serving.text import Text

PROBES, CHAT, CASES = {TEXTS!r}, {CHAT!r}, {CASES!r}

def foreign(digits, whole):
    backend = Tokenizer(models.BPE(ignore_merges=whole))
    split = pre_tokenizers.Split(Regex(TEXT % digits), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([split, level]), decoders.ByteLevel()
    if whole:
        backend.post_processor = processors.TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 1)])
    else:
        backend.normalizer = normalizers.NFC()
    kw = dict(special_tokens=SPECIAL, initial_alphabet=level.alphabet(), show_progress=False)
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, **kw))
    return make_tokenizer(backend)

shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
shape |= dict(max_position_embeddings=512, vocab_size=512, initializer_range=0.2, eos_token_id=[0, 4])
rope = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
rope |= dict(original_max_position_embeddings=128)
torch.manual_seed(0)
tiny_model("llama", max_length=512)
sizes = dict(hidden_size=64, heads=4, kv_heads=2, head_dim=32, intermediate_size=96, tie_embeddings=False)
save_model(build(ModelConfig(arch="qwen3", **sizes)), train_tokenizer(TEXTS, 500), "qwen3")
qwen2 = AutoModelForCausalLM.from_config(Qwen2Config(**shape, tie_word_embeddings=True))
for name, p in qwen2.named_parameters():
    if name.endswith("bias"):
        torch.nn.init.normal_(p, 0, 0.5)
save_model(qwen2, foreign(r"\\p{{N}}", False), "qwen2")
llama3 = AutoModelForCausalLM.from_config(LlamaConfig(**shape, rope_parameters=rope, tie_word_embeddings=False))
save_model(llama3, foreign(r"\\p{{N}}{{1,3}}", True), "llama3")
found = {{}}
for case in CASES:
    for kind in ("fp32", "q8_0", "q4_0"):
        write_gguf(case, f"{{case}}-{{kind}}.gguf", kind)
    text, model = Text.load(case), AutoModelForCausalLM.from_pretrained(case, dtype=torch.float32).eval()
    ids = [text.encode(t) for t in PROBES]
    replies = []
    for prompt in ids[:3]:
        inputs = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=32)
        replies.append(out[0, len(prompt):].tolist())
    chat = text.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    found[case] = dict(ids=ids, replies=replies, chat=chat)
Path("found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with GGUF files of every case, and what torch and our tokenizers make of the texts."""
    home = tmp_path_factory.mktemp("gguf")
    subprocess.run([PYTHON, "-c", MAKE], cwd=home, env=environment(), check=True)
    return home


class Llama:
    """A running `llama-server`, keys and values in 32 bits as torch has them."""

    def __init__(self, model: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as s:
            port = s.getsockname()[1]
        words = [SERVER, "-m", model, "--port", port, "--host", "127.0.0.1", "-c", 512, "-np", 1, "-t", 1]
        words += ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
        self.base, self.log = f"http://127.0.0.1:{port}", model.with_suffix(".log")
        with self.log.open("wb") as out:
            self.process = subprocess.Popen([str(w) for w in words], stdout=out, stderr=subprocess.STDOUT)
        until = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < until:
            try:
                if urllib.request.urlopen(f"{self.base}/health").status == 200:
                    return
            except OSError:
                time.sleep(0.05)
        self.close()
        pytest.fail(f"{model.name} does not load:\n{self.log.read_text()[-2000:]}")

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        """What the server answers."""
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.base + path, data, kind)) as response:
            return json.load(response)

    def reply(self, ids: list[int], n: int, **how: Any) -> list[int]:
        """The tokens that follow `ids`, without those that end a reply."""
        how |= {"temperature": 0, "top_k": 1, "return_tokens": True, "cache_prompt": False}
        return [t for t in self.ask("/completion", prompt=ids, n_predict=n, **how)["tokens"] if t not in (0, 4)]

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(params=[f"{case}-{kind}" for case in CASES for kind in ("fp32", "q8_0", "q4_0")])
def served(made: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, str, Llama, dict[str, Any]]]:
    """Case, number format, a server that has the file, and what it is held to."""
    case, kind = request.param.split("-")
    llama = Llama(made / f"{request.param}.gguf")
    yield case, kind, llama, json.loads((made / "found.json").read_text())[case]
    llama.close()


def test_it_loads_and_answers(served: tuple[str, str, Llama, dict[str, Any]]) -> None:
    _, kind, llama, wanted = served
    for text, ids in zip(TEXTS, wanted["ids"], strict=True):
        got = llama.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        assert got == ids, text
    assert llama.ask("/apply-template", messages=CHAT)["prompt"] == wanted["chat"]
    for ids, reply in zip(wanted["ids"], wanted["replies"], strict=False):
        if kind == "fp32":
            assert llama.reply(ids, 32) == [t for t in reply if t not in (0, 4)]
        else:
            assert len(llama.reply(ids, 8, ignore_eos=True)) == 8
