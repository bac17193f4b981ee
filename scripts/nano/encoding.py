"""Load the encoding file of the nano's checkpoint, which renders conversations."""

import importlib.util
from pathlib import Path

FILE = Path(__file__).with_name("checkpoint") / "encoding" / "encoding_dsv4.py"

_spec = importlib.util.spec_from_file_location("nano_encoding_dsv4", FILE)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
encode_messages, eos_token = _module.encode_messages, _module.eos_token
