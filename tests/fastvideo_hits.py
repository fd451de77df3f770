"""How often FastVideo's pipelines call each site, and how often with something new, worked out from their structure.

What is expected of three generations: calls and misses of each site, from what happens in one. A sinusoid is called
where an embedder is computed: at its misses, and once more at its first hit, which is checked.
"""

SEEDS = (0, 1, 0)

ROPE = "forward:get_rotary_pos_embed"
SINUSOID = "fastvideo.layers.visual_embedding:timestep_embedding"
EMBEDDER = "condition_embedder.time_embedder.forward"
MODULATION = "condition_embedder.time_modulation.forward"
TEXT = "condition_embedder.text_embedder.forward"
IMAGE = "condition_embedder.image_embedder.forward"
ACTION_ROPE = "fastvideo.models.dits.matrixgame2.action_module:_get_nd_rotary_pos_embed_matrixgame2"
KV = "pipeline:_initialize_kv_cache"
ACTION_KV = "pipeline:_initialize_action_kv_cache"

ALL = len(SEEDS)


ROTARY = "fastvideo.attention.layer:_apply_rotary_emb"
ACTION_ROTARY = "fastvideo.models.dits.matrixgame{}.action_module:_apply_rotary_emb"
EXPANSION = "dit_patch.functions.matrixgame:expansion"


def wan(forwards, steps, prompts=1, images=0, layers=2):
    """The passes of a step share its timestep; prompts and images are new in each generation."""
    every = ALL * forwards
    expected = {
        ROPE: (every, 1),
        SINUSOID: (ALL * steps + (forwards > steps), 0),
        EMBEDDER: (every, ALL * steps),
        MODULATION: (every, ALL * steps),
        TEXT: (every, ALL * prompts),
        ROTARY: (layers * every, 0),  # queries and keys in one tensor
    }
    return expected | ({IMAGE: (every, ALL * images)} if images else {})


def causal_wan(forwards, tables, caches=1, layers=2):
    """A timestep of its own for each forward; a rope table for each block of frames, kept for all generations."""
    every = ALL * forwards
    return {
        ROPE: (every, tables),
        SINUSOID: (every, 0),
        EMBEDDER: (every, every),
        MODULATION: (every, every),
        TEXT: (every, ALL),
        KV: (ALL * caches, 0),
        "forward:_apply_rotary_emb": (2 * layers * every, 0),
    }


def matrixgame2(blocks, action_modules=2, layers=3):
    """Three steps a block, and a forward more that fills the KV cache. Masks and the model's rope are never read."""
    every = ALL * blocks * (3 + 1)
    expected = {
        ROPE: (every, 1),
        SINUSOID: (every, 0),
        EMBEDDER: (every, every),
        MODULATION: (every, every),
        IMAGE: (every, ALL),
        "_prepare_blockwise_causal_attn_mask": (every, 1),
        "_prepare_blockwise_causal_attn_mask_action": (2 * every, 1),
        KV: (ALL, 0),
        "forward:causal_rope_apply": (2 * layers * every, 0),
        EXPANSION: (2 * layers * every, ALL * layers * blocks),  # known by the table, and so for a generation
    }
    if not action_modules:
        return expected
    turned = 4 * action_modules * every  # queries and keys, of the mouse and the keyboard
    return expected | {ACTION_ROPE: (action_modules, 1), ACTION_KV: (ALL, 0), ACTION_ROTARY.format(2): (turned, 0)}


def hunyuan(steps, layers=2 + 2):
    """Guidance is distilled, so that there is one pass a step."""
    every = ALL * steps
    inputs = ["guidance_in", "vector_in", "txt_in.c_embedder", "txt_in.input_embedder"]
    return {
        ROPE: (every, 1),
        SINUSOID: (2 * every + ALL + 1, 0),  # the guidance has one, too
        "time_in.forward": (every, every),
        "txt_in.t_embedder.forward": (every, every),
        **{f"{at}.forward": (every, ALL) for at in inputs},
        ROTARY: (layers * every, 0),
    }


def hunyuan15(steps, *timesteps, layers=2):
    """Two passes a step; an image of zeros stands for none, and to see whether it is that takes three operations."""
    every = ALL * 2 * steps
    prompts = ["txt_in.c_embedder", "txt_in.input_embedder", "txt_in_2"]
    return {
        ROPE: (every, 1),
        SINUSOID: (len(timesteps) * (ALL * steps + 1), 0),
        **{f"{at}.forward": (every, ALL * steps) for at in timesteps},
        **{f"{at}.forward": (every, ALL * 2) for at in prompts},
        "image_embedder.forward": (every, ALL),
        "cond_type_embed.forward": (3 * every, 3),
        "image_embedder..double_blocks.0": (3 * every, 3 * ALL),
        ROTARY: (layers * every, 0),
    }


def matrixgame3(clips, steps, layers, base, action_modules=2):
    """The first clip has no memory, nor has the base model's second pass."""
    frames = ALL * (clips + clips - 1)  # numbers of them: those of each clip, and those that it looks back at
    with_memory = (clips - 1) * steps  # forwards
    forwards = clips * steps * (1 + base)
    every = ALL * forwards
    # A pass without the memory has other timesteps and another camera, except in the first clip.
    timesteps = ALL * (clips * steps + base * with_memory)
    cameras = ALL * (clips + base * (clips - 1))
    rotations = ALL * 2 * layers * (forwards + with_memory)  # of queries and keys, of frames and of memory
    of_actions = ALL * 4 * action_modules * (forwards + with_memory)
    of_camera = ["camera_patch_embedding", "c2ws_hidden_states_layer1", "c2ws_hidden_states_layer2"]
    in_blocks = ["cam_injector_layer1", "cam_injector_layer2", "cam_scale_layer", "cam_shift_layer"]
    return {
        "forward:_build_rope_freqs": (every, 1),
        # Numbers of frames; and nine ranges and numbers, of which three differ, as the table is made, and checked.
        "..patch_embedding": (every + ALL * with_memory + 2 * 9, frames + 3),
        "forward:_apply_rope_with_frame_indices": (rotations, 0),
        EXPANSION: (rotations, frames),
        ACTION_ROTARY.format(3): (of_actions, 0),
        SINUSOID: (timesteps + base, 0),
        EMBEDDER: (every, timesteps),
        MODULATION: (every, timesteps),
        "text_embedding.forward": (every, ALL * (1 + base)),
        **{f"{at}.forward": (every, cameras) for at in of_camera},
        **{f"blocks.*.{at}.forward": (layers * every, layers * cameras) for at in in_blocks},
    }


EXPECTED = {
    "matrixgame2": [matrixgame2(blocks=5)],
    "matrixgame2, short": [matrixgame2(blocks=3)],
    "matrixgame2, relativistic": [matrixgame2(blocks=3)],
    "matrixgame2, no actions": [matrixgame2(blocks=3, action_modules=0)],
    # Four steps a block, and a forward more that fills the KV cache.
    "causal_wan": [causal_wan(forwards=4 * (4 + 1), tables=4)],
    "causal_wan, relativistic": [causal_wan(forwards=4 * (4 + 1), tables=1)],
    # Three steps of a block with one expert and five with the other; each has a KV cache.
    "causal_wan22": [causal_wan(3 * (3 + 1), tables=3, caches=2), causal_wan(3 * (5 + 1), tables=3, caches=2)],
    "causal_wan_steps": [causal_wan(forwards=3 * (3 + 1), tables=3)],
    "wan": [wan(forwards=8, steps=4, prompts=2)],
    "wan22": [wan(forwards=4, steps=2, prompts=2), wan(forwards=8, steps=4, prompts=2)],
    "wan_i2v": [wan(forwards=6, steps=3, prompts=2, images=1)],
    "wan_dmd": [wan(forwards=3, steps=3)],
    "hunyuan": [hunyuan(steps=4)],
    "hunyuan15": [hunyuan15(4, "time_in.timestep_embedder", "txt_in.t_embedder")],
    "hunyuan15, mean flow": [
        hunyuan15(4, "time_in.timestep_embedder", "time_in.timestep_embedder_r", "txt_in.t_embedder")
    ],
}
