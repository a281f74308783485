"""Authoring side of ruvltra-edge: fine-tune, export, prove and write bundles. Needs torch."""
