-- read and reset: the state of meters, without claiming anything.
--
-- ARGV: clock, `read` or `reset`, MessagePack array of kind, p1, p2, limit and key for each meter.
-- Reply: clock, then for `read` used, held and when it resets (-1: never) of each.
local f, names = cmsgpack.unpack(ARGV[3]), {}
for i = 1, #f, 5 do
  if f[i] ~= DISTINCT then names[#names + 1] = CELL .. f[i + 4] end
end
load_cells(names)

local function read_meter(kind, p1, p2, limit, key)
  if kind == DISTINCT then
    local name = MEMBERS .. key
    call('ZREMRANGEBYSCORE', name, '-inf', now)
    local last = call('ZREVRANGE', name, 0, 0, 'WITHSCORES')[2]
    return call('ZCARD', name), 0, last and tonumber(last)
  end
  local cell = cells[CELL .. key]
  if not cell then return 0, 0 end
  if kind == SLOTS then return 0, cell[2] end
  if kind == BUCKET then
    local _, backlog = drained(cell, limit)
    local used, held = in_units(cell, backlog, p1)
    return used, held, backlog > 0 and limit > 0 and cell[4] or nil
  end
  if kind == SLIDING then
    local current = (now - fmod(now, p1)) / p1
    local used, held = live(cell, (cell[3] > current and cell[3] or current) - p2)
    if used == 0 and held == 0 then return 0, 0 end
    local parts = cell[5]
    for at = #parts - 23, 1, -24 do
      local index, u, h = dec('<ddd', parts, at)
      if u ~= 0 or h ~= 0 then return used, held, (index + p2 + 1) * p1 end
    end
  end
  if now >= cell[4] then return 0, 0 end
  return cell[1], cell[2], cell[4]
end

local function reset_meter(kind, p1, p2, limit, key)
  if kind == DISTINCT then
    call('DEL', MEMBERS .. key)
    return
  end
  local cell = cells[CELL .. key]
  if not cell or kind == SLOTS then return end
  cell[7] = kind
  if kind == BUCKET then
    local at, backlog = drained(cell, limit)
    local held = cell[2] * p1
    fill(cell, limit, at, held < backlog and held or backlog)
  elseif kind == SLIDING then
    local left, first = {}, nil
    for at = 1, #cell[5], 24 do
      local index, _, h = dec('<ddd', cell[5], at)
      if h ~= 0 then
        first = first or index
        left[#left + 1] = enc('<ddd', index, 0, h)
      end
    end
    cell[1], cell[5], cell[6] = 0, table.concat(left), 2
    cell[4], cell[8] = ((first or cell[3]) + p2 + 1) * p1, (cell[3] + p2 + 1) * p1
  else
    cell[1], cell[6] = 0, 2
    if cell[2] == 0 then
      cell[4] = 0 -- over: the next admitted use starts a new window
    elseif kind ~= CALENDAR and now < cell[4] then
      cell[4] = now + p1 -- the window keeps its start, so that open holds still find it
    end
  end
end

local replies = {now}
for i = 1, #f, 5 do
  if ARGV[2] == 'read' then
    local used, held, resets = read_meter(f[i], f[i + 1], f[i + 2], f[i + 3], f[i + 4])
    local n = #replies
    replies[n + 1], replies[n + 2], replies[n + 3] = used, held, resets or -1
  else
    reset_meter(f[i], f[i + 1], f[i + 2], f[i + 3], f[i + 4])
  end
end
save_cells()
return replies
