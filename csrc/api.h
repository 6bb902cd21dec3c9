// Marks what other libraries use of libmnv2_fused; all else is hidden.
#pragma once

#define MNV2_FUSED_API __attribute__((visibility("default")))
