# mypy: ignore-errors
# (warp reads the annotations as its own language)
"""The few kernels of our own beside mujoco_warp's."""

import warp as wp


@wp.kernel(enable_backward=False)
def capsule_frames(
    geom_type: wp.array(dtype=int),
    geom_xmat: wp.array2d(dtype=wp.mat33),
    count: wp.array(dtype=int),
    geoms: wp.array(dtype=wp.vec2i),
    world: wp.array(dtype=int),
    plane: int,
    capsule: int,
    frame: wp.array(dtype=wp.mat33),
):
    # First tangent of a plane-capsule contact: the capsule's axis projected on the plane, whatever its length.
    c = wp.tid()
    if c >= count[0]:
        return
    pair = geoms[c]
    if pair[0] < 0 or geom_type[pair[0]] != plane or geom_type[pair[1]] != capsule:
        return
    pose = geom_xmat[world[c], pair[1]]
    old = frame[c]
    normal = wp.vec3(old[0, 0], old[0, 1], old[0, 2])
    axis = wp.vec3(pose[0, 2], pose[1, 2], pose[2, 2])
    tangent = axis - normal * wp.dot(normal, axis)
    length = wp.length(tangent)
    if length < 1.0e-7:
        return
    tangent = tangent / length
    other = wp.cross(normal, tangent)
    frame[c] = wp.mat33(
        normal[0], normal[1], normal[2], tangent[0], tangent[1], tangent[2], other[0], other[1], other[2]
    )


@wp.kernel(enable_backward=False)
def read_state(nq: int, qpos: wp.array2d(dtype=float), qvel: wp.array2d(dtype=float), out: wp.array2d(dtype=float)):
    world, i = wp.tid()
    if i < nq:
        out[world, i] = qpos[world, i]
    else:
        out[world, i] = qvel[world, i - nq]


@wp.kernel(enable_backward=False)
def write_start(
    mask: wp.array(dtype=bool),
    nq: int,
    start: wp.array2d(dtype=float),
    qpos: wp.array2d(dtype=float),
    qvel: wp.array2d(dtype=float),
):
    world, i = wp.tid()
    if not mask[world]:
        return
    if i < nq:
        qpos[world, i] = start[world, i]
    else:
        qvel[world, i - nq] = start[world, i]


@wp.kernel(enable_backward=False)
def clear_rows(mask: wp.array(dtype=bool), x: wp.array2d(dtype=float)):
    world, i = wp.tid()
    if mask[world]:
        x[world, i] = 0.0


@wp.kernel(enable_backward=False)
def copy_rows(mask: wp.array(dtype=bool), source: wp.array2d(dtype=float), x: wp.array2d(dtype=float)):
    world, i = wp.tid()
    if mask[world]:
        x[world, i] = source[world, i]


@wp.kernel(enable_backward=False)
def mark_contacts(
    room: int,
    pairs: wp.array(dtype=int),
    count: wp.array(dtype=int),
    world: wp.array(dtype=int),
    touching: wp.array(dtype=bool),
):
    c = wp.tid()
    if pairs[0] > room or count[0] > room:
        if c < touching.shape[0]:
            touching[c] = True
    elif c < count[0]:
        touching[world[c]] = True
