"""placeholder"""
def world_size() -> int:
    return 1
