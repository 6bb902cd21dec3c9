// Marks the functions of libmnv2_fused that other libraries call; all others are hidden.
#pragma once

#define MNV2_FUSED_API __attribute__((visibility("default")))
