"""Curation: from raw pairs to what is trained on: selections, duplicates, clusters, mined negatives."""
