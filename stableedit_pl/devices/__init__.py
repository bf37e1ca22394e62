"""All that knows there is more than one device or process.

Imports ``method``, for the sizes of its work.

Processes: ``ranks`` (what they send one another), ``rank_strategy``, ``shares`` (a turn's edits divided), ``division``
(its algebra divided). Models in parts: ``weight_shards``, ``sharding``, ``lockstep``. Several devices in one process:
``memory`` (bytes), ``placement``, ``device_maps``.
"""
