"""Clients that join a run late or leave it: who trains when, and what of them stays."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from federation import START, Federated
from runs_for_tests import adapters_of, save_model, scores_of, settings_for, write_clients

from fedalt.core.settings import Stay
from fedalt.engine.members import Members
from fedalt.engine.states import server_of
from fedalt.methods import METHODS
from fedalt.runs.folder import open_run
from fedalt.runs.lifecycle import start_run
from fedalt.runs.settings import SettingsError, settings_of, to_toml
from fedalt.runs.setup import prepare

CLIENTS = ("a", "b", "c")
STAYS = {"b": {"leaves": 2}, "c": {"joins": 1}}
