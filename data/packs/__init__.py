"""Samples -> batches: packing, the attention of a pack, batches of one class label each, copies to a GPU."""
