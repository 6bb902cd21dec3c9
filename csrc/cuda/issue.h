// What a warp of the block kernel issues, for plans and predictions. bench/cuda_issue.py counts it in the machine code
// and writes the table; run it after every change of the kernel.
#pragma once

namespace mnv2 {
namespace cuda {

// Instructions of a warp on sm_90a.
struct Issue {
  double start;      // once
  double place;      // for 32 pixels of the table of places
  double round;      // every round, before its first chunk
  double pixel;      // to copy 32 vectors of 16 bytes of the input
  double find;       // to find where 32 times four values of a stem's tile come from, if not dense
  double values;     // and to copy them, for every row
  double row_block;  // of the expansion's pixels that are multiplied together
  double step;       // and for every step of their sum
  double window;     // if these are a stem's windows
  double chunk;      // every chunk besides the expansion: barriers, projection, what the filter does once
  double tap;        // of the filter, for a lane's patch
  double copy;       // every chunk, of one warp alone: to fetch weights
  double store;      // every round, of sums and biases
  double residual;   // every round, if there is one
};

// By arithmetic (fp16, bf16, tf32, exact fp32), kColumnTiles and filter (as in filter.cuh).
// clang-format off
constexpr Issue kIssue[4][6][3] = {
    // counts: begin, nvcc 13.0
    {
        {{262, 67, 61, 19, 147, 24, 83, 19, 41, 160, 55, 109, 101, 91},  // half, 2 tiles, filter 0
         {265, 67, 56, 19, 149, 25, 79, 19, 41, 119, 20, 110, 103, 91},  // half, 2 tiles, filter 1
         {265, 67, 56, 19, 149, 25, 79, 19, 41, 119, 23, 110, 103, 91},  // half, 2 tiles, filter 2
        },
        {{269, 67, 65, 19, 147, 25, 83, 19, 41, 165, 54, 109, 147, 162},  // half, 3 tiles, filter 0
         {276, 67, 63, 19, 147, 25, 79, 19, 41, 121, 20, 110, 152, 160},  // half, 3 tiles, filter 1
         {276, 67, 63, 19, 148, 25, 79, 19, 41, 121, 23, 110, 152, 160},  // half, 3 tiles, filter 2
        },
        {{208, 67, 89, 19, 147, 25, 81, 19, 41, 166, 54, 110, 144, 178},  // half, 4 tiles, filter 0
         {218, 67, 78, 19, 147, 24, 82, 19, 41, 134, 20, 109, 142, 178},  // half, 4 tiles, filter 1
         {218, 67, 78, 19, 147, 24, 82, 19, 41, 133, 23, 109, 142, 178},  // half, 4 tiles, filter 2
        },
        {{216, 66, 83, 19, 147, 24, 53, 14, 26, 143, 38, 109, 138, 158},  // half, 8 tiles, filter 0
         {234, 66, 79, 19, 147, 24, 47, 14, 26, 166, 12, 110, 138, 158},  // half, 8 tiles, filter 1
         {234, 66, 79, 19, 147, 24, 47, 14, 26, 166, 12, 110, 138, 158},  // half, 8 tiles, filter 2
        },
        {{162, 66, 68, 19, 150, 25, 63, 14, 26, 184, 38, 107, 236, 232},  // half, 12 tiles, filter 0
         {160, 66, 68, 19, 150, 25, 63, 14, 26, 182, 12, 106, 236, 232},  // half, 12 tiles, filter 1
         {160, 66, 68, 19, 150, 25, 63, 14, 26, 182, 12, 106, 236, 232},  // half, 12 tiles, filter 2
        },
        {{218, 70, 107, 19, 147, 25, 53, 14, 26, 179, 38, 109, 221, 370},  // half, 20 tiles, filter 0
         {249, 65, 104, 19, 147, 25, 47, 14, 26, 206, 12, 109, 226, 370},  // half, 20 tiles, filter 1
         {249, 65, 104, 19, 147, 25, 47, 14, 26, 206, 12, 109, 226, 370},  // half, 20 tiles, filter 2
        },
    },
    {
        {{212, 71, 70, 19, 148, 25, 84, 19, 41, 220, 106, 107, 148, 107},  // bfloat16, 2 tiles, filter 0
         {225, 67, 65, 19, 148, 25, 80, 19, 41, 126, 54, 109, 148, 105},  // bfloat16, 2 tiles, filter 1
         {225, 67, 65, 19, 148, 25, 80, 19, 41, 126, 73, 109, 148, 105},  // bfloat16, 2 tiles, filter 2
        },
        {{214, 67, 74, 19, 148, 25, 84, 19, 41, 225, 106, 107, 190, 198},  // bfloat16, 3 tiles, filter 0
         {229, 67, 69, 19, 148, 25, 80, 19, 41, 125, 54, 109, 190, 200},  // bfloat16, 3 tiles, filter 1
         {229, 67, 69, 19, 148, 25, 80, 19, 41, 126, 73, 109, 190, 200},  // bfloat16, 3 tiles, filter 2
        },
        {{213, 71, 81, 19, 147, 25, 79, 19, 41, 231, 106, 110, 141, 178},  // bfloat16, 4 tiles, filter 0
         {223, 67, 73, 19, 147, 25, 82, 19, 41, 135, 54, 109, 142, 178},  // bfloat16, 4 tiles, filter 1
         {223, 67, 73, 19, 147, 25, 82, 19, 41, 134, 73, 109, 142, 178},  // bfloat16, 4 tiles, filter 2
        },
        {{218, 66, 83, 19, 147, 25, 53, 14, 26, 178, 74, 109, 138, 158},  // bfloat16, 8 tiles, filter 0
         {233, 66, 79, 19, 147, 25, 47, 14, 26, 201, 38, 110, 138, 158},  // bfloat16, 8 tiles, filter 1
         {233, 66, 79, 19, 147, 25, 47, 14, 26, 199, 41, 110, 138, 158},  // bfloat16, 8 tiles, filter 2
        },
        {{160, 66, 68, 19, 150, 25, 63, 14, 26, 217, 73, 107, 235, 232},  // bfloat16, 12 tiles, filter 0
         {160, 70, 68, 19, 150, 25, 63, 14, 26, 215, 38, 107, 235, 232},  // bfloat16, 12 tiles, filter 1
         {160, 70, 68, 19, 150, 25, 63, 14, 26, 216, 41, 107, 235, 232},  // bfloat16, 12 tiles, filter 2
        },
        {{218, 70, 107, 19, 147, 25, 53, 14, 26, 214, 74, 109, 221, 370},  // bfloat16, 20 tiles, filter 0
         {249, 65, 104, 19, 147, 25, 47, 14, 26, 239, 38, 109, 226, 370},  // bfloat16, 20 tiles, filter 1
         {249, 65, 104, 19, 147, 25, 47, 14, 26, 239, 41, 109, 226, 370},  // bfloat16, 20 tiles, filter 2
        },
    },
    {
        {{220, 61, 59, 19, 148, 23, 96, 100, 96, 230, 60, 109, 123, 36},  // tf32, 2 tiles, filter 0
         {219, 68, 59, 19, 148, 23, 96, 100, 96, 226, 28, 109, 123, 36},  // tf32, 2 tiles, filter 1
         {219, 68, 59, 19, 148, 23, 96, 100, 96, 226, 29, 109, 123, 36},  // tf32, 2 tiles, filter 2
        },
        {{217, 61, 71, 19, 148, 23, 102, 100, 96, 250, 60, 109, 136, 79},  // tf32, 3 tiles, filter 0
         {221, 68, 61, 19, 148, 23, 96, 100, 96, 249, 28, 109, 136, 79},  // tf32, 3 tiles, filter 1
         {221, 68, 61, 19, 148, 23, 96, 100, 96, 249, 29, 109, 136, 79},  // tf32, 3 tiles, filter 2
        },
        {{217, 61, 75, 19, 148, 23, 101, 100, 96, 282, 60, 109, 129, 15},  // tf32, 4 tiles, filter 0
         {226, 68, 62, 19, 148, 23, 96, 100, 96, 279, 28, 113, 131, 15},  // tf32, 4 tiles, filter 1
         {226, 68, 62, 19, 148, 23, 96, 100, 96, 279, 29, 113, 131, 15},  // tf32, 4 tiles, filter 2
        },
        {{217, 61, 83, 19, 147, 23, 102, 100, 96, 370, 60, 109, 136, 47},  // tf32, 8 tiles, filter 0
         {216, 68, 83, 19, 147, 23, 100, 100, 96, 368, 28, 109, 136, 47},  // tf32, 8 tiles, filter 1
         {216, 68, 83, 19, 147, 23, 100, 100, 96, 368, 29, 109, 136, 47},  // tf32, 8 tiles, filter 2
        },
        {{238, 61, 70, 19, 147, 23, 96, 109, 96, 461, 59, 113, 150, 71},  // tf32, 12 tiles, filter 0
         {218, 68, 93, 19, 147, 23, 102, 101, 96, 464, 28, 109, 157, 71},  // tf32, 12 tiles, filter 1
         {218, 68, 93, 19, 147, 23, 102, 101, 96, 464, 29, 109, 157, 71},  // tf32, 12 tiles, filter 2
        },
        {{218, 68, 109, 19, 147, 23, 102, 104, 96, 658, 60, 109, 197, 114},  // tf32, 20 tiles, filter 0
         {220, 68, 109, 19, 147, 23, 100, 104, 96, 656, 28, 109, 197, 114},  // tf32, 20 tiles, filter 1
         {220, 68, 109, 19, 147, 23, 100, 104, 96, 656, 29, 109, 197, 114},  // tf32, 20 tiles, filter 2
        },
    },
    {
        {{229, 61, 51, 19, 147, 23, 102, 423, 442, 633, 60, 114, 125, 36},  // float, 2 tiles, filter 0
         {266, 68, 42, 19, 147, 23, 102, 423, 443, 630, 28, 114, 114, 36},  // float, 2 tiles, filter 1
         {266, 68, 42, 19, 147, 23, 102, 423, 443, 630, 29, 114, 114, 36},  // float, 2 tiles, filter 2
        },
        {{237, 61, 45, 19, 147, 23, 98, 425, 445, 787, 60, 113, 127, 79},  // float, 3 tiles, filter 0
         {268, 68, 44, 19, 147, 23, 98, 423, 442, 788, 28, 113, 127, 79},  // float, 3 tiles, filter 1
         {268, 68, 44, 19, 147, 23, 98, 423, 442, 788, 29, 113, 127, 79},  // float, 3 tiles, filter 2
        },
        {{232, 61, 47, 19, 147, 23, 102, 428, 448, 953, 60, 113, 120, 15},  // float, 4 tiles, filter 0
         {263, 68, 48, 19, 147, 23, 102, 432, 454, 959, 28, 113, 120, 15},  // float, 4 tiles, filter 1
         {263, 68, 48, 19, 147, 23, 102, 432, 454, 961, 29, 113, 120, 15},  // float, 4 tiles, filter 2
        },
        {{222, 61, 79, 19, 147, 23, 102, 436, 458, 1589, 60, 107, 136, 47},  // float, 8 tiles, filter 0
         {236, 68, 55, 19, 147, 23, 102, 422, 442, 1569, 28, 113, 127, 47},  // float, 8 tiles, filter 1
         {236, 68, 55, 19, 147, 23, 102, 422, 442, 1569, 29, 113, 127, 47},  // float, 8 tiles, filter 2
        },
        {{218, 61, 87, 19, 147, 23, 108, 422, 442, 2207, 60, 107, 159, 71},  // float, 12 tiles, filter 0
         {221, 68, 87, 19, 147, 23, 104, 422, 442, 2205, 28, 107, 159, 71},  // float, 12 tiles, filter 1
         {221, 68, 87, 19, 147, 23, 104, 422, 442, 2205, 29, 107, 159, 71},  // float, 12 tiles, filter 2
        },
        {{218, 68, 101, 19, 147, 23, 109, 423, 442, 3438, 60, 107, 192, 117},  // float, 20 tiles, filter 0
         {218, 68, 101, 19, 147, 23, 109, 423, 442, 3421, 28, 107, 192, 117},  // float, 20 tiles, filter 1
         {218, 68, 101, 19, 147, 23, 109, 423, 442, 3421, 29, 107, 192, 117},  // float, 20 tiles, filter 2
        },
    },
    // counts: end
};
// clang-format on

}  // namespace cuda
}  // namespace mnv2
