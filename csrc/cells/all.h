// Every cell of the library. A new one is a header beside this one and a name in the list below.
// A program of recurra.jit has one cell, its own, which RECURRA_CELL names.
#pragma once
#if !defined(RECURRA_CELL)
#include "cells/elstm.h"
#include "cells/indrnn.h"
#include "cells/janet.h"
#include "cells/lem.h"
#include "cells/mgu.h"
#include "cells/mingru.h"
#include "cells/minlstm.h"
#include "cells/paragru.h"
#include "cells/paralstm.h"
#include "cells/peephole_lstm.h"
#include "cells/slstm.h"
#include "cells/sru.h"
#include "cells/tanh.h"
#include "cells/unicornn.h"
#endif

namespace recurra::RECURRA_ISA {

template <class... Cell>
struct CellList {
  static constexpr int size = sizeof...(Cell);
};

#if defined(RECURRA_CELL)
using Cells = CellList<RECURRA_CELL>;
#else
using Cells = CellList<ELstm, IndRnn, Janet, Lem, Mgu, MinGru, MinLstm, ParaGru, ParaLstm,
                       PeepholeLstm, SLstm, Sru, Tanh, UniCornn>;
#endif

constexpr bool same_name(const char* a, const char* b) {
  while (*a && *a == *b) ++a, ++b;
  return *a == *b;
}

// f(Cell{}) for every cell, in the order of the list.
template <class F, class... Cell>
void for_each_cell(F&& f, CellList<Cell...>) {
  (f(Cell{}), ...);
}
template <class F>
void for_each_cell(F&& f) {
  for_each_cell(f, Cells{});
}

// f(Cell{}) for the cell of that name; false if there is none.
template <class F, class... Cell>
bool with_cell(const char* name, F&& f, CellList<Cell...>) {
  return ((same_name(name, Cell::name) && (f(Cell{}), true)) || ...);
}
template <class F>
bool with_cell(const char* name, F&& f) {
  return with_cell(name, f, Cells{});
}

}  // namespace recurra::RECURRA_ISA
