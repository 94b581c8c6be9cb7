"""LLaVA's own command line, workers and web page, as they are, on a checkpoint with a fuser."""

import contextlib
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import host
import llava
import pytest
import requests
import torch
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from PIL import Image
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.fp16_cpu, pytest.mark.serve]
QUESTION = "What is the number?"
TOKENS = 64  # the page's slider has multiples of it
# train.py draws the projector before it seeds.
SEEDED = (
    "import runpy, sys, torch; del sys.argv[0]; torch.manual_seed(0); runpy.run_path(sys.argv[0], None, '__main__')"
)


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    """A finetuned LLaVA whose gates are open; LLaVA takes the prompt's format from `v1` in its name."""
    folder = tmp_path_factory.mktemp("serving") / "llava-v1-mmfuser"
    host.train(world, folder, "finetune", launcher=[sys.executable, "-c", SEEDED], max_steps=1)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith("gate.scale"):
            weights[name].fill_(20.0)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def picture(world):
    return world / "data" / "images" / "heldout_00000.png"


@pytest.fixture(scope="module")
def printed(checkpoint, picture):
    """What the command line answers."""
    command = [sys.executable, "-m", "llava.serve.cli", "--model-path", checkpoint, "--image-file", picture]
    command += ["--device", "cpu", "--temperature", "0", "--max-new-tokens", str(TOKENS)]
    done = subprocess.run(
        command, input=f"{QUESTION}\n", capture_output=True, text=True, env=host.environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert f"fuser weights: from {checkpoint}" in done.stderr
    start, end = "USER: ASSISTANT: ", "USER: exit...\n"
    assert done.stdout.startswith(start) and done.stdout.endswith(end), done.stdout
    return done.stdout[len(start) : -len(end)].strip()


def without_blanks(text):
    """A streamer loses the blank at the start of a line, and a browser shows fewer of them."""
    return "".join(text.split())


def test_cli_answers_as_the_model_does_which_the_gates_change(checkpoint, picture, printed):
    tokenizer, model, processor, _ = load_pretrained_model(str(checkpoint), None, checkpoint.name, device="cpu")
    image = Image.open(picture).convert("RGB")
    conversation = conv_templates["llava_v1"].copy()
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{QUESTION}")
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]

    def answer():
        with torch.inference_mode():
            output = model.generate(
                ids,
                images=process_images([image], processor, model.config).half(),
                image_sizes=[image.size],
                do_sample=False,
                max_new_tokens=TOKENS,
            )
        return without_blanks(tokenizer.decode(output[0], skip_special_tokens=True))

    assert answer() == without_blanks(printed)
    model.get_model().mm_projector.fuser.cross_gate.reset_parameters()
    assert answer() != without_blanks(printed)


def listens(port):
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def server(module, port, folder, *arguments, **env):
    """Runs `python -m llava.serve.MODULE` while it is entered, which waits until it listens; logs go to `folder`."""
    command = [sys.executable, "-m", f"llava.serve.{module}", "--host", "127.0.0.1", "--port", port, *arguments]
    with open(folder / f"{module}.txt", "w+", errors="replace") as log:
        process = host.start(command, log, host.environment(**env), cwd=folder)
        try:
            late = time.monotonic() + 120
            while not listens(port):
                if process.poll() is not None or time.monotonic() > late:
                    log.seek(0)
                    pytest.fail(f"{module} does not listen\n{log.read()[-6000:]}")
                time.sleep(0.1)
            yield
        finally:
            host.stop(process)


@pytest.fixture(scope="module")
def controller(checkpoint, tmp_path_factory):
    """Address of a controller with one worker."""
    folder = tmp_path_factory.mktemp("controller")
    ports = host.free_port(), host.free_port()
    address, worker = (f"http://127.0.0.1:{port}" for port in ports)
    arguments = ["--controller-address", address, "--worker-address", worker, "--model-path", checkpoint]
    with server("controller", ports[0], folder):
        with server("model_worker", ports[1], folder, *arguments, "--device", "cpu"):
            yield address


@pytest.mark.slow
def test_worker_streams_what_the_cli_prints(controller, checkpoint, picture, printed):
    state = conv_templates["llava_v1"].copy()  # as the web page makes it
    image = Image.open(picture).convert("RGB")
    state.append_message(state.roles[0], (f"{QUESTION}\n{DEFAULT_IMAGE_TOKEN}", image, "Default"))
    state.append_message(state.roles[1], None)
    prompt = state.get_prompt()
    assert requests.post(f"{controller}/list_models").json() == {"models": [checkpoint.name]}
    worker = requests.post(f"{controller}/get_worker_address", json={"model": checkpoint.name}).json()["address"]
    load = dict(model=checkpoint.name, prompt=prompt, images=state.get_images(), stop=state.sep2)
    load.update(temperature=0, top_p=0.7, max_new_tokens=TOKENS)
    response = requests.post(f"{worker}/worker_generate_stream", json=load, stream=True, timeout=60)
    parts = [json.loads(part) for part in response.iter_lines(delimiter=b"\0") if part]
    assert len(parts) > TOKENS // 2 and {part["error_code"] for part in parts} == {0}, parts[-1]
    assert parts[-1]["text"][len(prompt) :].strip() == printed


@pytest.fixture
def page(controller, picture, tmp_path):
    """Address of the web page."""
    upstream = shutil.copytree(Path(llava.__file__).parent, tmp_path / "llava")
    (upstream / "serve" / "examples").mkdir(exist_ok=True)
    for name in ("extreme_ironing.jpg", "waterview.jpg"):  # the page shows them, but PyPI's wheel leaves them out
        Image.open(picture).save(upstream / "serve" / "examples" / name)
    port = host.free_port()
    arguments = ["--controller-url", controller, "--model-list-mode", "reload"]
    env = dict(PYTHONPATH=str(tmp_path), GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str(tmp_path / "gradio"))
    with server("gradio_web_server", port, tmp_path, *arguments, **env):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium, which asks nothing of the net by itself."""
    if not shutil.which("chromedriver"):
        pytest.skip("chromedriver is missing, by which the tests see the page")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.page_load_strategy = "eager"  # gradio's page asks for fonts
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags += f" disable-component-update disable-sync window-size=1280,1200 user-data-dir={tmp_path / 'chromium'}"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="scripts/test.sh serve has gradio and a browser")
def test_page_answers_in_a_browser_as_the_cli_does(page, browser, picture, printed, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(page)

    def find(selector):
        return WebDriverWait(browser, 60).until(lambda _: browser.find_elements(By.CSS_SELECTOR, selector))[-1]

    question = find("textarea[placeholder='Enter text and press ENTER']")
    browser.find_element(By.XPATH, "//span[text()='Parameters']").click()
    for name, value in (("Temperature", 0), ("Max output tokens", TOKENS)):
        find(f"input[aria-label='number input for {name}']").send_keys(Keys.CONTROL + "a" + Keys.NULL, str(value))
    find("input[type=file]").send_keys(str(picture))
    find("[data-testid=image] img")  # uploaded
    question.send_keys(QUESTION + Keys.ENTER)
    find("#buttons button:not([disabled])")  # Upvote and so on, once there is an answer
    browser.save_screenshot(str(tmp_path / "page.png"))
    assert without_blanks(find("#chatbot [data-testid=bot]").text) == without_blanks(printed)
