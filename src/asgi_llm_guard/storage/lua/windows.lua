-- The arithmetic of windows: the same as in `storage/cells.py`, field by field.

-- Sub-buckets are 24 bytes each, oldest first.
local function live(cell, oldest)
  local used, held, parts, at = cell[1], cell[2], cell[5], 1
  while at < #parts do
    local index, u, h, following = dec('<ddd', parts, at)
    if index >= oldest then break end
    used, held, at = used - u, held - h, following
  end
  return used, held
end

local function forget_parts(cell, newest, size, count)
  local parts, oldest, at = cell[5], newest - count, 1
  local first, u, h, following = dec('<ddd', parts, at)
  while first < oldest do
    cell[1], cell[2], at = cell[1] - u, cell[2] - h, following
    first, u, h, following = dec('<ddd', parts, at)
  end
  if at > 1 then cell[5] = sub(parts, at) end
  cell[3] = newest
  cell[4] = (first + count + 1) * size
  cell[8] = (newest + count + 1) * size
end

local function sliding_fits_at(cell, amount, limit, total, newest, size, count)
  if amount > limit then return nil end
  local missing, parts, at = total - (limit - amount), cell[5], 1 -- so that no sum passes 2^53
  while at < #parts do
    local index, u, h, following = dec('<ddd', parts, at)
    if index >= newest - count then
      missing = missing - u - h
      if missing <= 0 then return (index + count + 1) * size end
    end
    at = following
  end
  return nil
end

-- Add to the sub-bucket number `pin` if there is one; gives whether there was.
local function change_part(cell, pin, used, held)
  local parts = cell[5]
  local at = #parts - 23
  while at > 0 do
    local index, u, h = dec('<ddd', parts, at)
    if index == pin then
      cell[5] = sub(parts, 1, at - 1) .. enc('<ddd', pin, u + used, h + held) .. sub(parts, at + 24)
      cell[1], cell[2] = cell[1] + used, cell[2] + held
      return true
    end
    if index < pin then return false end
    at = at - 24
  end
  return false
end

-- Put an empty sub-bucket with this number into its place.
local function insert_part(cell, pin)
  local parts = cell[5]
  local at = #parts - 23
  while at > 0 and dec('<d', parts, at) > pin do at = at - 24 end
  cell[5] = sub(parts, 1, at + 23) .. enc('<ddd', pin, 0, 0) .. sub(parts, at + 24)
end

local function drained(cell, limit)
  if now <= cell[3] then return cell[3], cell[1] end
  local backlog = cell[1] - (now - cell[3]) * limit
  return now, backlog > 0 and backlog or 0
end

local function in_units(cell, backlog, period)
  local units = ceil_div(backlog, period)
  local held = cell[2] < units and cell[2] or units
  return units - held, held
end

-- Past 2^53 - 1 the backlog stays there: no store could add to it exactly.
local function fill(cell, limit, at, backlog)
  if backlog > MAX then backlog = MAX end
  cell[1], cell[3], cell[4], cell[6] = backlog, at, at + ceil_div(backlog, limit > 0 and limit or 1), 2
end
