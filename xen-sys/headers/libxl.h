/* Domain management, a new ABI with each release. Without libxl_json.h, which needs yajl. */
#include <libxl.h>
#include <libxl_event.h>
#include <libxl_utils.h>
