"""Where every byte of a parameter lives: specs, boxes, layouts, views and the planner. Pure arithmetic on shapes."""

from titan_bridge.sharding.boxes import Box, Piece, local_shape_of, pieces_of
from titan_bridge.sharding.layout import Layout, MeshLayout, ParamLayout
from titan_bridge.sharding.spec import ShardingSpec, attach, get, placement_from_str
from titan_bridge.sharding.tensors import Chunk, OnMesh, TensorMetadata
from titan_bridge.sharding.view import View

__all__ = ["Box", "Chunk", "Layout", "MeshLayout", "OnMesh", "ParamLayout", "Piece", "ShardingSpec"]
__all__ += ["TensorMetadata", "View", "attach", "get", "local_shape_of", "pieces_of", "placement_from_str"]
