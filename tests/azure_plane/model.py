"""A model folder for the mock engine: a tokenizer and a configuration, written without torch in a tenth of a second."""

from __future__ import annotations

import json
from pathlib import Path

from llmkit.core.tiny import CHAT_TEMPLATE, END_IDS, SPECIAL, TEXTS


def mock_model(folder: Path, max_length: int = 256) -> Path:
    """Write the folder; its weights file holds no weight, which the mock engine does not read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": tokenizer.get_vocab_size()}
    config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "max_position_embeddings": max_length, "eos_token_id": END_IDS}
    (folder / "config.json").write_text(json.dumps(config))
    told = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[1], "model_max_length": max_length}
    (folder / "tokenizer_config.json").write_text(json.dumps(told | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder
