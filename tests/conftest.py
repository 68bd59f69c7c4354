"""What every test shares: where the project is, and nothing of the user's own settings."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# No window, no user's start-up files, no user's kernels: set before anything imports them.
os.environ["MPLBACKEND"] = "Agg"
os.environ["IPYTHONDIR"] = tempfile.mkdtemp(prefix="nvmx-lab-ipython-")
os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"

# No deadline: the first example of a jitted function pays for its compilation.
settings.register_profile("here", deadline=None)
# In CI the same examples every time: a red run is then about the change that it checks.
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


@pytest.fixture(scope="session")
def project() -> Path:
    """Return the project's root folder."""
    return Path(__file__).resolve().parent.parent
