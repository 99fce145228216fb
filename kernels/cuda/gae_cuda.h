// Interface of generalised advantage estimation in CUDA; as token_stats_cuda.h.
#pragma once
#include "../gae_args.h"
#include "token_stats_cuda.h"

namespace fastalign::cuda {

template <class T>
void gae(const GaeArgs<T>& args, const Place& place);

}  // namespace fastalign::cuda
