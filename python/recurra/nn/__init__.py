"""Mixers: what a block of a language model does along time.

A mixer is a module with ``forward(x, state=None, *, cu_seqlens=None) -> (y, state)`` and
``step(x, state) -> y``. Whole sequences, sequences in chunks with the state carried, and single
steps give the same results.
"""

from recurra.nn._config import MixerConfig
from recurra.nn.aaren import Aaren, AarenConfig
from recurra.nn.attention import Attention, AttentionConfig, AttentionState
from recurra.nn.ffn import GLU, GLUConfig
from recurra.nn.hgrn import HGRN, HGRNConfig
from recurra.nn.log_space import log_space_scan
from recurra.nn.lrnn import LRNN, LRNNConfig
from recurra.nn.lru import LRU, LRUConfig
from recurra.nn.mamba import Mamba, MambaConfig, MambaState
from recurra.nn.norm import RMSNorm
from recurra.nn.qrnn import QRNN, QRNNConfig, QRNNState
from recurra.nn.rg_lru import RGLRU, RGLRUConfig, RGLRUState
from recurra.nn.rnn import RNN, RNNConfig, RNNState
from recurra.nn.rwkv4 import (
    RWKV4,
    RWKV4Channel,
    RWKV4ChannelConfig,
    RWKV4ChannelState,
    RWKV4Config,
    RWKV4State,
)
from recurra.nn.s4 import LSSL, S4D, S5, LSSLConfig, S4DConfig, S5Config
from recurra.nn.scrn import SCRN, SCRNConfig, SCRNState

__all__ = [
    "FFNS",
    "GLU",
    "HGRN",
    "LRNN",
    "LRU",
    "LSSL",
    "MIXERS",
    "QRNN",
    "RGLRU",
    "RNN",
    "RWKV4",
    "S4D",
    "S5",
    "SCRN",
    "Aaren",
    "AarenConfig",
    "Attention",
    "AttentionConfig",
    "AttentionState",
    "GLUConfig",
    "HGRNConfig",
    "LRNNConfig",
    "LRUConfig",
    "LSSLConfig",
    "Mamba",
    "MambaConfig",
    "MambaState",
    "MixerConfig",
    "QRNNConfig",
    "QRNNState",
    "RGLRUConfig",
    "RGLRUState",
    "RMSNorm",
    "RNNConfig",
    "RNNState",
    "RWKV4Channel",
    "RWKV4ChannelConfig",
    "RWKV4ChannelState",
    "RWKV4Config",
    "RWKV4State",
    "S4DConfig",
    "S5Config",
    "SCRNConfig",
    "SCRNState",
    "log_space_scan",
]

# The configurations of all mixers.
MIXERS: tuple[type[MixerConfig], ...] = (
    MambaConfig,
    RNNConfig,
    RWKV4Config,
    LRNNConfig,
    LRUConfig,
    HGRNConfig,
    QRNNConfig,
    SCRNConfig,
    S4DConfig,
    S5Config,
    LSSLConfig,
    AarenConfig,
    RGLRUConfig,
    AttentionConfig,
)
# Those of the feed-forward layers.
FFNS: tuple[type[MixerConfig], ...] = (GLUConfig, RWKV4ChannelConfig)
