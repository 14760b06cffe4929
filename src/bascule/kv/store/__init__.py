"""Tiers below the device arena: blocks as bytes in RAM, in a directory or on Redis servers, behind one protocol."""
