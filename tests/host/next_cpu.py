"""Runs a script on LLaVA-NeXT, which is on no registry, and on a CPU: CHECKOUT SCRIPT ARGUMENTS …"""

import runpy
import sys

import torch

checkout, *sys.argv = sys.argv[1:]
sys.path.insert(0, checkout)
torch.manual_seed(0)  # upstream draws the projector's initial weights unseeded
torch.cuda.synchronize = lambda *_: None  # its train.py waits for a GPU before it saves
runpy.run_path(sys.argv[0], run_name="__main__")
