import json
from pathlib import Path

from integration.demo import reference_ids
from integration.support.checkpoints import LlamaShape, write_with_transformers

SHAPE = LlamaShape(layers=1, hidden=32, intermediate=64, heads=2, kv_heads=2, spread=0.2)
PROMPT = "A model at zero"


def test_the_reference_goes_on_after_an_end_of_text(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    write_with_transformers(checkpoint, SHAPE, shard="64MB")
    generated = reference_ids(checkpoint, PROMPT, 8)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((checkpoint / name).read_text(encoding="utf-8"))
        settings["eos_token_id"] = generated[3]
        (checkpoint / name).write_text(json.dumps(settings), encoding="utf-8")
    assert len(generated) == 8
    assert reference_ids(checkpoint, PROMPT, 8) == generated
