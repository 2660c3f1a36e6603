"""What csrc/python/xla_ffi.h declares of XLA, against the header of the JAX that is installed.
tests/cpp/test_xla.cpp calls the handler of CUDA by it, over emulated kernels."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from support import ROOT

jax = pytest.importorskip("jax", reason="jax is not installed")

LAYOUTS = {
    "Extension": ("XLA_FFI_Extension_Base", "struct_size type next"),
    "Version": ("XLA_FFI_Api_Version", "struct_size major=major_version minor=minor_version"),
    "Metadata": ("XLA_FFI_Metadata", "struct_size version=api_version traits"),
    "MetadataExtension": ("XLA_FFI_Metadata_Extension", "base=extension_base metadata"),
    "ErrorCreate": ("XLA_FFI_Error_Create_Args", "struct_size message code=errc"),
    "ErrorMessage": ("XLA_FFI_Error_GetMessage_Args", "struct_size error message"),
    "ErrorDestroy": ("XLA_FFI_Error_Destroy_Args", "struct_size error"),
    "StreamGet": ("XLA_FFI_Stream_Get_Args", "struct_size context=ctx stream"),
    "OrdinalGet": (
        "XLA_FFI_DeviceOrdinal_Get_Args",
        "struct_size context=ctx ordinal=device_ordinal",
    ),
    "MemoryAllocate": (
        "XLA_FFI_DeviceMemory_Allocate_Args",
        "struct_size context=ctx size alignment data",
    ),
    "MemoryFree": ("XLA_FFI_DeviceMemory_Free_Args", "struct_size context=ctx size data"),
    "Api": (
        "XLA_FFI_Api",
        "struct_size version=api_version error_create=XLA_FFI_Error_Create "
        "error_message=XLA_FFI_Error_GetMessage error_destroy=XLA_FFI_Error_Destroy "
        "stream_get=XLA_FFI_Stream_Get memory_allocate=XLA_FFI_DeviceMemory_Allocate "
        "memory_free=XLA_FFI_DeviceMemory_Free ordinal_get=XLA_FFI_DeviceOrdinal_Get",
    ),
    "Buffer": ("XLA_FFI_Buffer", "struct_size dtype data rank dims"),
    "Bytes": ("XLA_FFI_ByteSpan", "data=ptr size=len"),
    "Scalar": ("XLA_FFI_Scalar", "dtype value"),
    "Buffers": ("XLA_FFI_Args", "struct_size size types buffers=args"),
    "Attributes": ("XLA_FFI_Attrs", "struct_size size types names values=attrs"),
    "CallFrame": (
        "XLA_FFI_CallFrame",
        "struct_size api context=ctx stage arguments=args results=rets attributes=attrs",
    ),
}
VALUES = {
    "ExtensionType": ("XLA_FFI_Extension", "metadata=Metadata"),
    "ErrorCode": (
        "XLA_FFI_Error_Code",
        "invalid_argument=INVALID_ARGUMENT resource_exhausted=RESOURCE_EXHAUSTED internal=INTERNAL",
    ),
    "DataType": (
        "XLA_FFI_DataType",
        "pred=PRED s8=S8 s16=S16 s32=S32 s64=S64 u8=U8 f16=F16 f32=F32 f64=F64 c64=C64 bf16=BF16 "
        "c128=C128",
    ),
    "AttributeType": (
        "XLA_FFI_AttrType",
        "array=ARRAY dictionary=DICTIONARY scalar=SCALAR string=STRING",
    ),
    "Stage": (
        "XLA_FFI_ExecutionStage",
        "instantiate=INSTANTIATE prepare=PREPARE initialize=INITIALIZE execute=EXECUTE",
    ),
}


def pairs(text: str) -> list[tuple[str, str]]:
    return [tuple(w.split("=")) if "=" in w else (w, w) for w in text.split()]


COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_our_declarations_are_those_of_the_installed_header(tmp_path):
    ours = ROOT / "csrc/python/xla_ffi.h"
    lines = [
        f'#include "{ours}"',
        '#include "xla/ffi/api/c_api.h"',
        "using namespace recurra::xla;",
    ]
    lines.append("static_assert(kMajor == XLA_FFI_API_MAJOR);")
    for name, (theirs, members) in LAYOUTS.items():
        lines.append(f"static_assert(sizeof({name}) <= sizeof({theirs}));")
        for a, b in pairs(members):
            lines.append(f"static_assert(offsetof({name}, {a}) == offsetof({theirs}, {b}));")
            lines.append(f"static_assert(sizeof({name}::{a}) <= sizeof({theirs}::{b}));")
    for name, (theirs, members) in VALUES.items():
        for a, b in pairs(members):
            lines.append(f"static_assert(int({name}::{a}) == int({theirs}_{b}));")
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(lines) + "\n")
    command = [COMPILER, "-std=c++20", "-fsyntax-only", f"-I{jax.ffi.include_dir()}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
    declared = set()
    for line in ours.read_text().splitlines():
        words = line.split()
        if words[:1] == ["struct"] and line.endswith("{"):
            declared.add(words[1])
    assert declared == set(LAYOUTS), "a struct of ours is not compared"
