"""Thin adapters to hosts, imported lazily."""
