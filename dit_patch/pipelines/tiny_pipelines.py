"""Small but real diffusers pipelines with random weights, built offline.

Every component has the class that the released model uses, only smaller; tokenizers are trained here on a few
sentences. A prompt goes in, and frames come out. `demo` and the tests use them. Nothing here knows of patches.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

TRAINING_TEXT = (
    "A cat and a dog bake a cake together in a sunny kitchen, the camera moves slowly around them.",
    "A red balloon drifts over a quiet harbour at dawn while small waves roll towards the shore.",
    "Slow motion, a paper boat floats down a stream between green leaves and bright stones.",
    "Blurred details, static, overexposed, low quality, worst quality, subtitles, ugly, still picture.",
    " ".join(string.printable),
)
MAX_TEXT_TOKENS = 512

_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def wan_pipeline(seed: int = 0, **transformer_config):
    """Build a Wan 2.1 text-to-video `WanPipeline`: 16 latent channels, 8x smaller than the frames in space, 4x in time.

    `transformer_config` overrides arguments of `WanTransformer3DModel`: 8 blocks of 4 heads with 64 channels.
    """
    with _seeded(seed):
        return _wan(_wan_transformer(transformer_config))


def wan22_pipeline(seed: int = 0, boundary_ratio: float = 0.875, **transformer_config):
    """Build a Wan 2.2 `WanPipeline`: `transformer` runs from timestep `boundary_ratio` * 1000, `transformer_2` below.

    Two different sets of random weights; `transformer_config` overrides arguments of both.
    """
    with _seeded(seed):
        high_noise, low_noise = _wan_transformer(transformer_config), _wan_transformer(transformer_config)
        return _wan(high_noise, transformer_2=low_noise, boundary_ratio=boundary_ratio)


def hunyuan_video_pipeline(seed: int = 0, **transformer_config):
    """Build a `HunyuanVideoPipeline` with embedded guidance: 16 latent channels, 8x smaller in space and 4x in time.

    `transformer_config` overrides arguments of `HunyuanVideoTransformer3DModel`: 3 double and 5 single blocks of 8
    heads with 32 channels. The tokenizer splits the start of the pipeline's prompt template, as the released one does,
    into exactly the 95 tokens that the pipeline crops.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    with _seeded(seed):
        tokenizer, tokenizer_2 = llama3_tokenizer(), clip_tokenizer()
        return HunyuanVideoPipeline(
            tokenizer=tokenizer,
            text_encoder=_llama_encoder(tokenizer),
            tokenizer_2=tokenizer_2,
            text_encoder_2=_clip_encoder(tokenizer_2),
            transformer=_hunyuan_video_transformer(transformer_config),
            vae=_hunyuan_video_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        )


def t5_tokenizer(text: Iterable[str] = TRAINING_TEXT):
    """Train a T5 tokenizer (Unigram) of some hundred pieces on `text`; it ends each text with `</s>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import T5TokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=MAX_TEXT_TOKENS)


def llama3_tokenizer():
    """Train a byte-level BPE tokenizer that splits words as Llama 3's; each text starts with `<|begin_of_text|>`."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    begin, end, pad = "<|begin_of_text|>", "<|end_of_text|>", "<pad>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = _byte_level_trainer([begin, end, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", pad])
    # The template is learnt too, so that each of its words becomes one token, as in Llama 3's vocabulary.
    tokenizer.train_from_iterator((DEFAULT_PROMPT_TEMPLATE["template"], *TRAINING_TEXT), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=pad, model_max_length=MAX_TEXT_TOKENS
    )


def clip_tokenizer():
    """Train a CLIP tokenizer (byte-level BPE, lower case) for at most 77 tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPTokenizerFast

    begin, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE(unk_token=end, continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TRAINING_TEXT, _byte_level_trainer([begin, end], end_of_word_suffix="</w>"))
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, tokenizer.token_to_id(end)),
        (begin, tokenizer.token_to_id(begin)),
        trim_offsets=False,
        add_prefix_space=False,
    )
    return CLIPTokenizerFast(tokenizer_object=tokenizer, model_max_length=77)


def _byte_level_trainer(special_tokens: list[str], **options):
    from tokenizers import pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trainers.BpeTrainer(
        vocab_size=1200, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False, **options
    )


def _wan(transformer, **second_expert):
    from diffusers import UniPCMultistepScheduler, WanPipeline

    tokenizer = t5_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=umt5_encoder(tokenizer),
        transformer=transformer,
        vae=_wan_vae(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        **second_expert,
    )


def _wan_transformer(overrides: dict):
    from diffusers import WanTransformer3DModel

    config = {
        "num_layers": 8,
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "ffn_dim": 1024,
        "freq_dim": 64,
        "text_dim": 64,
    }
    return WanTransformer3DModel(**(config | overrides)).eval()


def _wan_vae():
    from diffusers import AutoencoderKLWan

    return _with_smooth_decoder(AutoencoderKLWan(base_dim=8, num_res_blocks=1).eval())


def umt5_encoder(tokenizer):
    """Build a UMT5 encoder of width 64 with random weights."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(vocab_size=len(tokenizer), num_layers=2, d_model=64, num_heads=4, d_kv=16, d_ff=128)
    return UMT5EncoderModel(config).eval()


def _hunyuan_video_transformer(overrides: dict):
    from diffusers import HunyuanVideoTransformer3DModel

    config = {
        "num_layers": 3,
        "num_single_layers": 5,
        "num_refiner_layers": 2,
        "num_attention_heads": 8,
        "attention_head_dim": 32,
        "rope_axes_dim": (8, 12, 12),
        "text_embed_dim": 64,
        "pooled_projection_dim": 32,
    }
    return HunyuanVideoTransformer3DModel(**(config | overrides)).eval()


def _hunyuan_video_vae():
    from diffusers import AutoencoderKLHunyuanVideo

    vae = AutoencoderKLHunyuanVideo(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=8)
    return _with_smooth_decoder(vae.eval())


def _llama_encoder(tokenizer):
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=MAX_TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaModel(config).eval()


def _clip_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=64,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def _with_smooth_decoder(vae):
    """Make the decoder's kernels smooth: torch's random ones turn latents into grey specks, not coloured shapes."""
    import torch

    bump = torch.tensor([1.0, 2.0, 1.0])
    with torch.no_grad():
        for kernels in _image_kernels(vae.decoder):
            kernels.copy_(kernels.mean((-2, -1), keepdim=True) * bump * bump[:, None])
            kernels.div_(kernels.square().flatten(1).sum(1).mean().sqrt())
        for kernels in _image_kernels(vae.decoder.conv_out):
            kernels.mul_(0.4)
    return vae


def _image_kernels(module) -> Iterator:
    return (weight for weight in module.parameters() if weight.dim() >= 4 and weight.shape[-2:] == (3, 3))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's random numbers inside; the caller's go on afterwards as if nothing had happened."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
