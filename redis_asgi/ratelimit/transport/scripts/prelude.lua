-- What the strategies share. Each adds its maker under its letter; what it makes has load, wait, charge, refund, reset,
-- save, and is made when first needed: all the functions of all of them cost as much as a decision.
-- `load` sets s.free (the largest cost admitted now, below 0 when in debt) and s.receipt_now; times are whole us.
-- A stored time in the future, which a clock that was set back leaves, or a replica whose clock is behind, counts as now;
-- `load` then sets s.moved, and what is saved is of now. What was counted stays, what was counted then is not given back.
-- The arithmetic, its order included, is mirrored by the in-process twin in strategies.py; change both together.

local make, made = {}, {}
-- The ids of the requests in flight that the request at hand is about.
local holders = {}
local call, format, match = redis.call, string.format, string.match
local ceil, floor, max, min, tonumber = math.ceil, math.floor, math.max, math.min, tonumber

-- For times: Lua's own conversion, %.14g, cuts a time of 16 digits. Counts up to 10^10 it writes exactly.
local function integer(x) return format('%.0f', x) end

-- The parts of a stored field, as text: Lua's arithmetic reads numbers in text, comparison does not.
local function parts(raw, pattern)
  local a, b, c = match(raw, pattern)
  if not a then error('ERR not a counter of this package: ' .. string.sub(raw, 1, 40), 0) end
  return a, b, c
end

-- A key stays this much longer (ms) than it counts: for the clock of a replica that takes over, or, under a clock that a
-- test holds, while that stands still.
local SLACK = ARGV[2] == '' and 1000 or 600000

-- After a write, so that a server out of memory refuses the write itself. Never shortens, and heals a key without a TTL;
-- a new key that may have none does not stay, and where the user may not ask how long it has, it gets one all the
-- same. Errors are raised without a position.
local function expire(key, us)
  if us <= 0 then return end
  local needed = ceil(us / 1000) + SLACK
  local left = redis.pcall('PTTL', key)
  local denied = type(left) == 'table' and left.err
  if denied then left = -1 elseif left >= needed then return end
  local said = redis.pcall('PEXPIRE', key, integer(needed))
  if type(said) == 'table' and said.err then
    if left < 0 then call('UNLINK', key) end
    error(said.err, 0)
  end
  if denied then error(denied, 0) end
end
