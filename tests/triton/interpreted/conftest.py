"""These tests run in Triton's interpreter, which must be chosen before Triton is imported.

Therefore ``test_triton_interpreter.py`` starts them in a process of their own; by hand, set TRITON_INTERPRET=1.
"""

import os

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
