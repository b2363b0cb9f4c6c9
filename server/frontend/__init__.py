"""The public face: proto in, proto out, and everything that guards what lies behind it."""
