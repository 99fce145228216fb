// Interface of generalised advantage estimation on the CPU.
#pragma once
#include "../gae_args.h"

namespace fastalign {

template <class T>
void gae(const GaeArgs<T>& args);

}  // namespace fastalign
