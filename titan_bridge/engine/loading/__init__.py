"""Weights into the live parameters: from a checkpoint of any format, from a stream of tensors, or while serving."""
