/* Libraries whose ABI Xen keeps over releases. */
#include <xencall.h>
#include <xenforeignmemory.h>
#include <xentoollog.h>
