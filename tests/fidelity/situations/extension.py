"""What a trainer adds to vLLM's workers (``--worker-extension-cls``): a way to load weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file


class LoadsFiles:
    """A worker's further methods."""

    model_runner: Any

    def load_file(self, weights_path: str) -> None:
        """Load some of the model's weights."""
        self.model_runner.get_model().load_weights(load_file(Path(weights_path)).items())
