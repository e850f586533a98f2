"""A family of your own in thirty lines: Mistral, which is Llama's arithmetic under another name.

    python scripts/examples/own_family.py parity DIR     # DIR: a MistralForCausalLM in Hugging Face format
    python scripts/examples/own_family.py serve DIR --tp 2

Here the command line runs with the family registered. In a package of your own, an entry point does it, and every
command and `vllm serve` know the family (see titan_bridge/models/README.md, also for models that need new modules).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_bridge import cli
from titan_bridge.models import register
from titan_bridge.models.fields import UnsupportedModelError
from titan_bridge.models.llama3 import Llama3
from titan_bridge.parallelize import rules_of


class Mistral(Llama3):
    """Reads Mistral's config.json into TorchTitan's Llama 3; weights have the same names."""

    name = "mistral"
    architectures = ("MistralForCausalLM",)
    model_types = {"MistralForCausalLM": "mistral"}  # noqa: RUF012

    @property
    def sharding(self) -> Any:
        return rules_of("llama3")

    def model_config(self, hf: Mapping[str, Any], **options: Any) -> Any:
        if hf.get("sliding_window") is not None:  # what it cannot compute, a family refuses
            raise UnsupportedModelError(
                f"sliding_window={hf['sliding_window']} is not supported with MistralForCausalLM; allowed: null"
            )
        return super().model_config(hf, **options)

    def hf_config(self, config: Any, **options: Any) -> dict[str, Any]:
        llama = super().hf_config(config, **options)
        return llama | {"architectures": list(self.architectures), "model_type": "mistral"}


FAMILY = Mistral()

if __name__ == "__main__":
    here, path = str(Path(__file__).parent), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, path]))  # for the processes that it starts
    register("own_family:FAMILY")
    sys.exit(cli.main(sys.argv[1:]))
