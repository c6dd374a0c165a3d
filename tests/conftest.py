"""Shapes and types in signatures are executed in every test; threads are fixed."""

from jaxtyping import install_import_hook

install_import_hook("colfolio", "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(2)
