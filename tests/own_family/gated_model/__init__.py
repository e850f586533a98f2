"""A decoder with gated attention, in TorchTitan (`model`) and for titan_bridge (`family`)."""
